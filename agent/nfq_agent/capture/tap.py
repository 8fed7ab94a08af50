"""A tap: the traffic of interfaces as packets for the elements. Whatever their verdict, the packet has already passed.

It runs in the worker; the supervisor sends it one socket for each interface and tells it which interfaces are gone.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from nfq_agent.answering import Answering
from nfq_agent.capture.following import Table
from nfq_agent.capture.selection import CaptureSelection
from nfq_agent.capture.source import InterfaceSource, Taken, packet_of
from nfq_agent.host import packet_socket
from nfq_agent.host.ring import ODD, OUTGOING, SEGMENTED, UNFINISHED, Ring, moment
from nfq_agent.packet import Packet, PacketError
from nfq_agent.verdict import WOULD_DROP, Verdict

# A packet as a ring gives it: payload, whole length, time, flags, ethertype.
Seen = tuple[bytes, int, float, int, int]
# The last block of a ring arrives some time after the interface is gone.
_LAST_BLOCK: Final = 3 * packet_socket.RETIRE


class _Tapped(Taken):
    """One interface's socket and ring."""

    __slots__ = ("mtu", "ring", "socket", "unreadable")

    def __init__(self, opened: socket.socket, size: int, index: int, row: int, mtu: int) -> None:
        super().__init__(index, row)
        self.socket = opened
        self.ring = Ring(opened.fileno(), packet_socket.BLOCK, packet_socket.blocks_of(size), index)
        self.mtu = mtu
        self.unreadable = 0


class TapSource(InterfaceSource[_Tapped]):
    """The source of packets of one `[tap.NAME]`."""

    where = "was seen by a tap and has left"

    def __init__(self, selection: CaptureSelection, table: Table) -> None:
        """table: where each is counted, in the row that comes with it."""
        super().__init__(table)
        self._selection = selection
        self._by_descriptor: dict[int, _Tapped] = {}
        self._ready: list[_Tapped] = []
        self._leaving: list[tuple[float, _Tapped]] = []
        # The monotonic clock when frames were last taken, and how far the clock of the frames is ahead of it.
        self._taken_at = self._ahead = 0.0

    # The interfaces.

    def add(self, descriptor: int, index: str, row: str, mtu: str, ring: str) -> None:
        """Read one more interface from this socket. ring: bytes of its ring."""
        opened = socket.socket(fileno=descriptor)
        try:
            tapped = _Tapped(opened, int(ring), int(index), int(row), int(mtu))
        except OSError:
            opened.close()
            raise
        self._by_descriptor[descriptor] = self._taken[tapped.index] = tapped
        self._poll.register(descriptor, select.EPOLLIN)

    def _release(self, taken: _Tapped) -> None:
        """Read an interface to its end."""
        self._leaving.append((time.monotonic() + _LAST_BLOCK, taken))

    def _leave(self) -> None:
        now = time.monotonic()
        for due, tapped in list(self._leaving):
            if due <= now:
                self._leaving.remove((due, tapped))
                self._close(tapped)

    def _close(self, tapped: _Tapped) -> None:
        self._count_lost(tapped)
        self._poll.unregister(tapped.socket.fileno())
        del self._by_descriptor[tapped.socket.fileno()]
        if tapped in self._ready:
            self._ready.remove(tapped)
        tapped.ring.close()
        tapped.socket.close()

    # Called by the worker's loop.

    def wait(self, timeout: float) -> list[int]:
        """Wait for packets or the control descriptor. Returns the readable descriptors."""
        if self._leaving:
            self._leave()
            timeout = min(timeout, _LAST_BLOCK)
        found = []
        for descriptor, event in self._poll.poll(timeout):
            found.append(descriptor)
            tapped = self._by_descriptor.get(descriptor)
            if tapped is None:
                continue
            if event & select.EPOLLERR:
                # The interface is down or gone (ENETDOWN): reported once; reading SO_ERROR clears it.
                tapped.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if tapped not in self._ready:
                self._ready.append(tapped)
        return found

    def _next(self) -> _Tapped | None:
        """An interface that has packets; None if none has."""
        if not self._ready:
            self.wait(0)
        return self._ready[0] if self._ready else None

    def _note_time(self) -> None:
        self._taken_at = time.monotonic()
        self._ahead = time.time() - self._taken_at

    def moment(self, packet: Packet) -> float:
        """When a packet of this turn passed, in seconds of the monotonic clock: the kernel hands over many frames together."""
        return moment(packet.time or 0.0, self._ahead, self._taken_at)

    def read(self, budget: int) -> list[Packet]:
        """Up to `budget` packets."""
        self._note_time()
        packets: list[Packet] = []
        while len(packets) < budget and (tapped := self._next()) is not None:
            room = budget - len(packets)
            seen = tapped.ring.read(room)
            if len(seen) < room:
                self._ready.pop(0)
            found = [packet for each in seen if (packet := self._packet(tapped, each)) is not None]
            self._table.add(tapped.row, "judged", len(found))
            packets += found
        return packets

    def _packet(self, tapped: _Tapped, seen: Seen) -> Packet | None:
        """The packet, or None for one that the filter could not judge and that is not chosen."""
        payload, length, seconds, flags, kind = seen
        packet = packet_of(
            payload,
            tapped.index,
            outgoing=bool(flags & OUTGOING),
            id=self._last + 1,
            length=length,
            hw_protocol=kind,
            time=seconds,
            gso=bool(flags & SEGMENTED) or length > tapped.mtu,
            checksum_ready=not flags & UNFINISHED,
        )
        if flags & ODD and not self._selection.everything and not self._chosen(tapped, packet):
            return None
        self._last += 1
        return packet

    def _chosen(self, tapped: _Tapped, packet: Packet) -> bool:
        try:
            headers = packet.headers
        except PacketError:
            # The elements see it, and it is counted as malformed there.
            return True
        if headers.transport is None:
            self._table.add(tapped.row, "fragments", 1)
            return False
        return self._selection.takes(headers.five_tuple)

    def answer(self, answers: Sequence[tuple[Packet, Verdict]]) -> None:
        """Count what would have been dropped; nothing is done to a packet."""
        for packet, verdict in answers:
            if verdict is WOULD_DROP:
                self._count(packet.indev or packet.outdev, "would_drop", 1)

    def verdict(self, packet: Packet, verdict: Verdict) -> None:
        """A late verdict changes nothing."""

    def finish(self) -> None:
        """Close all."""
        for tapped in list(self._by_descriptor.values()):
            self._close(tapped)
        self._taken.clear()
        self._leaving.clear()

    def drops(self) -> int:
        """Frames lost because a ring was full, of all interfaces."""
        for tapped in self._by_descriptor.values():
            self._count_lost(tapped)
        return self._lost

    def _count_lost(self, tapped: _Tapped) -> None:
        if lost := packet_socket.lost(tapped.socket):
            self._lost += lost
            self._table.add(tapped.row, "lost", lost)
        if unread := tapped.ring.unknown - tapped.unreadable:
            tapped.unreadable += unread
            self._table.add(tapped.row, "unreadable", unread)

    # The turns without an object for each packet.

    def skim(self, verdict: Verdict, budget: int) -> int:  # noqa: ARG002  # a tap gives no verdict
        """Count up to `budget` packets."""
        return len(self.read(budget))

    def _wait_for_packets(self) -> None:
        if not self._ready:
            super()._wait_for_packets()

    def _sort(
        self, known: dict[bytes, Verdict], decide: Callable[[Packet, bytes | None], Verdict], budget: int
    ) -> tuple[int, list[tuple[int, int, Verdict]]]:
        runs: list[tuple[Verdict, int]] = []
        taken = 0
        while taken < budget and (tapped := self._next()) is not None:

            def ask(seen: Seen, key: bytes | None, tapped: _Tapped = tapped) -> Verdict | None:
                packet = self._packet(tapped, seen)
                return None if packet is None else decide(packet, key)

            begun = len(runs)
            count = tapped.ring.sort(budget - taken, known, ask, runs)
            if count < budget - taken:
                self._ready.pop(0)
            self._table.add(tapped.row, "judged", count)
            self._table.add(tapped.row, "would_drop", sum(number for verdict, number in runs[begun:] if verdict is WOULD_DROP))
            taken += count
        return taken, [(0, number, verdict) for verdict, number in runs]

    # The turns by flows (see `FlowQueue`).

    # No packet waits for a verdict.
    must_answer_each = False

    def judge(
        self,
        table: Answering,
        ask: Callable[[Packet], Verdict],
        now: float,  # noqa: ARG002  # each frame has its own time
        budget: int,
        each: bool = False,
    ) -> tuple[int, list[tuple[int, int, Verdict]], tuple[Packet, Verdict] | None]:
        """Count up to `budget` packets with the verdicts of their flows. Returns as `FlowQueue.judge` does."""
        if each:
            self._wait_for_packets()
        self._note_time()
        runs: list[tuple[Verdict, int]] = []
        taken = 0
        left = None
        while taken < budget and left is None and (tapped := self._next()) is not None:
            begun = len(runs)
            make = partial(self._packet, tapped)
            count, more, left = tapped.ring.judge(budget - taken, table, self._taken_at, self._ahead, tapped.mtu, make, ask, runs)
            if not more:
                self._ready.pop(0)
            self._table.add(tapped.row, "judged", count + (left is not None))
            self._table.add(tapped.row, "would_drop", sum(number for verdict, number in runs[begun:] if verdict is WOULD_DROP))
            taken += count
            if more:
                break
        return taken + (left is not None), [(0, number, verdict) for verdict, number in runs], left
