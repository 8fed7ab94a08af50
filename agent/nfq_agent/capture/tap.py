"""A tap: what comes and goes on interfaces, as packets for the elements. Whatever their verdict, the packet has gone on.

It lives in the worker; the supervisor hands it one socket for each interface and tells it which interfaces are gone.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Sequence
from typing import Final

from nfq_agent.capture.following import Table
from nfq_agent.capture.selection import CaptureSelection
from nfq_agent.host import packet_socket
from nfq_agent.host.frames import ODD, OUTGOING, SEGMENTED, UNFINISHED, Ring
from nfq_agent.packet import Hook, Packet, PacketError
from nfq_agent.verdict import WOULD_DROP, RewriteError, Verdict, VerdictError

# A packet as a ring gives it: payload, whole length, time, flags, ethertype.
Seen = tuple[bytes, int, float, int, int]
# The last block of a ring comes some time after the interface is gone.
_LAST_BLOCK: Final = 3 * packet_socket.RETIRE
_LONGEST_WAIT: Final = 0.1


class _Tapped:
    """One interface's socket and ring."""

    __slots__ = ("index", "mtu", "ring", "row", "socket", "unreadable")

    def __init__(self, opened: socket.socket, size: int, index: int, row: int, mtu: int) -> None:
        self.socket = opened
        self.ring = Ring(opened.fileno(), packet_socket.BLOCK, packet_socket.blocks_of(size), index)
        self.index = index
        self.row = row
        self.mtu = mtu
        self.unreadable = 0


class TapSource:
    """The source of packets (see `PacketSource`) of one `[tap.NAME]`."""

    def __init__(self, selection: CaptureSelection, ring: int, table: Table) -> None:
        """ring: bytes for each interface. table: where each is counted, in the row that comes with it."""
        self._selection = selection
        self._size = ring
        self._table = table
        self._tapped: dict[int, _Tapped] = {}
        self._by_index: dict[int, _Tapped] = {}
        self._ready: list[_Tapped] = []
        self._leaving: list[tuple[float, _Tapped]] = []
        self._poll = select.epoll()
        self._lost = 0
        self._last = 0
        self.unanswered = 0

    # The interfaces.

    def add(self, descriptor: int, index: str, row: str, mtu: str) -> None:
        """Read one more interface from this socket."""
        opened = socket.socket(fileno=descriptor)
        try:
            tapped = _Tapped(opened, self._size, int(index), int(row), int(mtu))
        except OSError:
            opened.close()
            raise
        self._tapped[descriptor] = self._by_index[tapped.index] = tapped
        self._poll.register(descriptor, select.EPOLLIN)

    def gone(self, index: str) -> None:
        """Read an interface to its end: it is gone, or chosen no more."""
        tapped = self._by_index.pop(int(index), None)
        if tapped is not None:
            self._leaving.append((time.monotonic() + _LAST_BLOCK, tapped))

    def _leave(self) -> None:
        now = time.monotonic()
        for due, tapped in list(self._leaving):
            if due <= now:
                self._leaving.remove((due, tapped))
                self._close(tapped)

    def _close(self, tapped: _Tapped) -> None:
        self._count_lost(tapped)
        self._poll.unregister(tapped.socket.fileno())
        del self._tapped[tapped.socket.fileno()]
        if tapped in self._ready:
            self._ready.remove(tapped)
        tapped.ring.close()
        tapped.socket.close()

    # What the loop asks of a source.

    @property
    def kernel(self) -> TapSource:
        """The quicker turns: this source has them too."""
        return self

    @property
    def last(self) -> int:
        """The number of the latest packet that was read."""
        return self._last

    def start(self, control: int) -> None:
        """Let `wait` return for this descriptor too."""
        self._poll.register(control, select.EPOLLIN)

    def wait(self, timeout: float) -> list[int]:
        """Wait for packets or the control descriptor; the readable descriptors."""
        if self._leaving:
            self._leave()
            timeout = min(timeout, _LAST_BLOCK)
        found = []
        for descriptor, event in self._poll.poll(timeout):
            found.append(descriptor)
            tapped = self._tapped.get(descriptor)
            if tapped is None:
                continue
            if event & select.EPOLLERR:
                # The interface is down or gone (ENETDOWN): told once, and taken note of by asking.
                tapped.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if tapped not in self._ready:
                self._ready.append(tapped)
        return found

    def _next(self) -> _Tapped | None:
        """An interface that has packets."""
        if not self._ready:
            self.wait(0)
        return self._ready[0] if self._ready else None

    def read(self, budget: int) -> list[Packet]:
        """Up to so many packets."""
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
        outgoing = flags & OUTGOING
        packet = Packet(
            payload,
            id=self._last + 1,
            hook=Hook.POSTROUTING if outgoing else Hook.PREROUTING,
            length=length,
            indev=0 if outgoing else tapped.index,
            outdev=tapped.index if outgoing else 0,
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
            # The elements' turn says so.
            return True
        if headers.transport is None:
            self._table.add(tapped.row, "fragments", 1)
            return False
        return self._selection.takes(headers.five_tuple)

    def check(self, packet: Packet, verdict: object) -> None:
        """Raise VerdictError unless it is a verdict, RewriteError for new bytes: the packet has gone on."""
        if not isinstance(verdict, Verdict):
            raise VerdictError(f"packet {packet.id}: {verdict!r} is not a verdict; allowed: a Verdict")
        if verdict.payload is not None:
            raise RewriteError(f"packet {packet.id} was seen by a tap and has gone on; it can't be rewritten")

    def answer(self, answers: Sequence[tuple[Packet, Verdict]]) -> None:
        """Count what would have been dropped; nothing is done to a packet."""
        for packet, verdict in answers:
            if verdict is WOULD_DROP and (tapped := self._by_index.get(packet.indev or packet.outdev)) is not None:
                self._table.add(tapped.row, "would_drop", 1)

    def verdict(self, packet: Packet, verdict: Verdict) -> None:
        """A late verdict changes nothing either."""

    def finish(self) -> None:
        """Close all."""
        for tapped in list(self._tapped.values()):
            self._close(tapped)
        self._by_index.clear()
        self._leaving.clear()

    def drops(self) -> int:
        """Frames lost for want of room in a ring, of all interfaces."""
        for tapped in self._tapped.values():
            self._count_lost(tapped)
        return self._lost

    def _count_lost(self, tapped: _Tapped) -> None:
        if lost := packet_socket.lost(tapped.socket):
            self._lost += lost
            self._table.add(tapped.row, "lost", lost)
        if unread := tapped.ring.unknown - tapped.unreadable:
            tapped.unreadable += unread
            self._table.add(tapped.row, "unreadable", unread)

    # The quicker turns, without an object for each packet (see `KernelQueue`).

    def be_patient(self, seconds: float, spin: float = 0.0) -> None:
        """A block comes when it is full or its time is over; there is nothing to be patient for."""

    def skim(self, verdict: Verdict, budget: int) -> int:  # noqa: ARG002  # a tap gives no verdict
        """Count up to so many packets."""
        return len(self.read(budget))

    def skim_each(self, verdict: Verdict, budget: int) -> int:
        """Wait for packets, and count them."""
        self.wait(_LONGEST_WAIT)
        return self.skim(verdict, budget)

    def sort(
        self,
        known: dict[bytes, Verdict],
        decide: Callable[[Packet, bytes | None], Verdict],
        budget: int,
        each: bool = False,
    ) -> tuple[int, list[tuple[int, int, Verdict]]]:
        """Look the verdicts of up to so many packets up; how many, and runs of equal verdicts (`KernelQueue.sort`)."""
        if each and not self._ready:
            self.wait(_LONGEST_WAIT)
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

    def answer_lost(self, below: int, verdict: Verdict) -> None:
        """No packet waits for a tap."""
