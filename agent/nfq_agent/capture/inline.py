"""An inline link: packets of interfaces that wait for their verdict, and go on or not. It lives in the worker.

The kernel passes everything when this process is gone (its links close), when it hangs (the heartbeat in a map goes stale) and
when it is slow (credits). What passes is counted there.
"""

from __future__ import annotations

import mmap
import os
import select
import time
from collections.abc import Callable, Sequence
from typing import Final

from nfq_agent.capture import link_maps
from nfq_agent.capture.following import Table
from nfq_agent.host.bpf import Map
from nfq_agent.host.frames import OUTGOING, SEGMENTED, UNFINISHED, Frames
from nfq_agent.packet import Hook, Packet, PacketError
from nfq_agent.verdict import WOULD_DROP, Action, RewriteError, Verdict, VerdictError

# Frames of a turn.
TURN: Final = 128
_LONGEST_WAIT: Final = 0.1
# After so long without a packet, credits that did not come back are given back: their frames were lost.
_LOST_AFTER: Final = 0.2
_TO_CONTAINER: Final = 0x80000000
_DRAIN: Final = 0.02


class InlineSource:
    """The source of packets (see `PacketSource`) of one `[inline.NAME]`."""

    def __init__(self, descriptor: int, live: Map, flows: Map, patience: float, table: Table) -> None:
        """descriptor: the packet socket. live, flows: maps of the program. patience: seconds. table: counters by interface."""
        self._frames = Frames(descriptor, TURN)
        self._descriptor = descriptor
        self._memory = mmap.mmap(live.descriptor, mmap.PAGESIZE)
        self._live = memoryview(self._memory).cast("Q")
        self._flows = flows
        self._beat_within = patience / 4
        self._table = table
        self._poll = select.epoll()
        self._poll.register(descriptor, select.EPOLLIN)
        self._links: dict[int, list[int]] = {}
        self._rows: dict[int, int] = {}
        self._held: dict[int, tuple[bytes, int]] = {}
        self._last = 0
        self._lost = 0
        self._idle_since: tuple[float, int] | None = None
        self.unanswered = 0

    # The interfaces. A link lives as long as its descriptor, and only this process has it.

    def add(self, ingress: int, egress: int, index: str, row: str) -> None:
        """Hold the links of an interface."""
        self._links[int(index)] = [ingress, egress]
        self._rows[int(index)] = int(row)

    def gone(self, index: str) -> None:
        """Let go of an interface."""
        for descriptor in self._links.pop(int(index), []):
            os.close(descriptor)
        self._rows.pop(int(index), None)

    # What the loop asks of a source.

    @property
    def kernel(self) -> InlineSource:
        """The quicker turns: this source has them too."""
        return self

    @property
    def last(self) -> int:
        """The number of the latest packet that was read."""
        return self._last

    def start(self, control: int) -> None:
        """Let `wait` return for this descriptor too; from now on the program sends packets here."""
        self._poll.register(control, select.EPOLLIN)
        self._beat()

    def _beat(self) -> None:
        self._live[link_maps.HEARTBEAT] = time.monotonic_ns()

    def wait(self, timeout: float) -> list[int]:
        """Wait for packets or the control descriptor; the readable descriptors."""
        self._beat()
        found = [descriptor for descriptor, _ in self._poll.poll(min(timeout, self._beat_within))]
        self._beat()
        if self._descriptor in found:
            self._idle_since = None
        else:
            self._give_back()
        return found

    def _give_back(self) -> None:
        """Credits of frames that were lost on the way here, once nothing has moved for a while."""
        live = self._live
        up, now = live[link_maps.UP], time.monotonic()
        if self._held or up == live[link_maps.DOWN]:
            self._idle_since = None
        elif self._idle_since is None or self._idle_since[1] != up:
            self._idle_since = now, up
        elif now - self._idle_since[0] > _LOST_AFTER:
            self._lost += max(0, up - live[link_maps.DOWN])
            live[link_maps.DOWN] = up
            live[link_maps.DOWN_BYTES] = live[link_maps.UP_BYTES]
            self._idle_since = None

    def _receive(self, budget: int) -> int:
        self._beat()
        try:
            return self._frames.receive(budget)
        except OSError:
            # One frame that the kernel can't describe; it has taken it out, and the next call goes on behind it.
            return 0

    def _packet(self, number: int) -> Packet | None:
        found = self._frames.packet(number)
        if found is None:
            return None
        payload, flags, kind, interface = found
        outgoing = flags & OUTGOING
        return Packet(
            payload,
            id=self._last - self._frames.count + number + 1,
            hook=Hook.POSTROUTING if outgoing else Hook.PREROUTING,
            indev=0 if outgoing else interface,
            outdev=interface if outgoing else 0,
            hw_protocol=kind,
            gso=bool(flags & SEGMENTED),
            checksum_ready=not flags & UNFINISHED,
            time=time.time(),
        )

    def read(self, budget: int) -> list[Packet]:
        """Up to so many packets."""
        count = self._receive(budget)
        self._last += count
        packets = [packet for number in range(count) if (packet := self._packet(number)) is not None]
        if count and not packets:
            self.answer(())
        return packets

    def check(self, packet: Packet, verdict: object) -> None:
        """Raise VerdictError unless it is a verdict that can be given here, RewriteError for new bytes."""
        if not isinstance(verdict, Verdict):
            raise VerdictError(f"packet {packet.id}: {verdict!r} is not a verdict; allowed: a Verdict")
        if verdict.payload is not None:
            raise RewriteError(f"packet {packet.id} is a frame on its way; it can't be rewritten")
        if verdict.action is Action.QUEUE:
            raise VerdictError(f"packet {packet.id}: there is no other queue for a packet of an interface")

    def answer(self, answers: Sequence[tuple[Packet, Verdict]]) -> None:
        """Send on what is accepted, and what goes with a verdict; keep what is retained."""
        frames = self._frames
        # A frame in which no packet was found goes on.
        going = bytearray(b"\1" * frames.count)
        first = self._last - frames.count + 1
        decided = []
        for packet, verdict in answers:
            number = packet.id - first
            if verdict.action is Action.RETAIN:
                self._held[packet.id] = frames.frame(number)
                going[number] = 0
                continue
            going[number] = verdict.outcome is not Action.DROP
            self._count(packet.indev or packet.outdev, verdict, 1)
            if verdict.means is not None:
                decided.append((packet, verdict))
            for other in verdict.inject:
                self._inject(packet, frames.frame(number)[0], other)
        self._lost += frames.send(going)
        for packet, verdict in decided:
            self._remember(packet, verdict)
        self._finish_turn()

    def _finish_turn(self) -> None:
        live = self._live
        live[link_maps.DOWN] += self._frames.count
        live[link_maps.DOWN_BYTES] += self._frames.size
        self._beat()

    def _count(self, interface: int, verdict: Verdict, number: int) -> None:
        row = self._rows.get(interface)
        if row is not None:
            self._table.add(row, "judged", number)
            if verdict.outcome is Action.DROP:
                self._table.add(row, "dropped", number)
            elif verdict is WOULD_DROP:
                self._table.add(row, "would_drop", number)

    def _remember(self, packet: Packet, verdict: Verdict) -> None:
        """Let the kernel decide the rest of this flow."""
        interface, accept = packet.indev or packet.outdev, verdict.means is not Action.DROP
        try:
            five_tuple = packet.headers.five_tuple
            link_maps.remember(self._flows, interface, five_tuple, packet.indev != 0, accept, time.monotonic_ns())
        except (OSError, PacketError):
            # It goes on to be judged packet by packet.
            return

    def _inject(self, packet: Packet, frame: bytes, other: bytes) -> None:
        """Send a packet of ours (a reset, an unreachable) as a frame: back with swapped addresses, on with the same ones.

        No route and no address of the host is needed, so that this works on a bridge that has none.
        """
        destination, source, kind = frame[10:16], frame[16:22], frame[22:24]
        forward = _source(other) == _source(packet.payload)
        interface = packet.indev or packet.outdev
        to_container = (packet.outdev != 0) == forward
        macs = destination + source if forward else source + destination
        if self._frames.put(bytes(10) + macs + kind + other, interface | (_TO_CONTAINER if to_container else 0)):
            self._lost += 1

    def verdict(self, packet: Packet, verdict: Verdict) -> None:
        """Give the verdict of a packet that was retained. Raises VerdictError if it has one."""
        held = self._held.pop(packet.id, None)
        if held is None:
            raise VerdictError(f"packet {packet.id} has its verdict already")
        self._count(packet.indev or packet.outdev, verdict, 1)
        if verdict.outcome is not Action.DROP:
            self._lost += self._frames.put(*held)

    def finish(self) -> None:
        """Let everything pass: first what comes, then what waits here."""
        self._live[link_maps.HEARTBEAT] = 0
        for index in list(self._links):
            self.gone(str(index))
        for held in self._held.values():
            self.unanswered += 1
            self._frames.put(*held)
        self._held.clear()
        quiet = time.monotonic() + _DRAIN
        while time.monotonic() < quiet:
            if count := self._receive_any():
                self.unanswered += count
                self._lost += self._frames.send(b"\1" * count)
                self._live[link_maps.DOWN] += count
                self._live[link_maps.DOWN_BYTES] += self._frames.size
                quiet = time.monotonic() + _DRAIN
            else:
                time.sleep(0.001)

    def _receive_any(self) -> int:
        try:
            return self._frames.receive(TURN)
        except OSError:
            return 0

    def drops(self) -> int:
        """Frames that did not come here, or could not be sent on."""
        return self._lost

    # The quicker turns, without an object for each packet (see `KernelQueue`).

    def be_patient(self, seconds: float, spin: float = 0.0) -> None:
        """The heartbeat bounds how long this waits."""

    def skim(self, verdict: Verdict, budget: int) -> int:
        """Give up to so many packets the same verdict."""
        count = self._receive(budget)
        self._last += count
        if count:
            self._sort({}, lambda _number, _key: verdict)
        return count

    def skim_each(self, verdict: Verdict, budget: int) -> int:
        """Wait for packets, and answer them."""
        self.wait(_LONGEST_WAIT)
        return self.skim(verdict, budget)

    def sort(
        self,
        known: dict[bytes, Verdict],
        decide: Callable[[Packet, bytes | None], Verdict],
        budget: int,
        each: bool = False,
    ) -> tuple[int, list[tuple[int, int, Verdict]]]:
        """Answer up to so many packets with verdicts that are known; how many, and runs of equal ones (`KernelQueue.sort`)."""
        if each:
            self.wait(_LONGEST_WAIT)
        count = self._receive(budget)
        if not count:
            return 0, []
        self._last += count

        def ask(number: int, key: bytes | None) -> Verdict:
            packet = self._packet(number)
            assert packet is not None
            return decide(packet, key)

        runs = self._sort(known, ask)
        return sum(number for _, number, _ in runs), [(self._last, number, verdict) for verdict, number, _ in runs]

    def _sort(
        self, known: dict[bytes, Verdict], decide: Callable[[int, bytes | None], Verdict]
    ) -> list[tuple[Verdict, int, int]]:
        """Answer this turn's frames; the runs of equal verdicts at one interface."""
        runs: list[tuple[Verdict, int, int]] = []
        self._lost += self._frames.send(self._frames.sort(known, decide, runs))
        for verdict, number, interface in runs:
            self._count(interface, verdict, number)
        self._finish_turn()
        return runs

    def answer_lost(self, below: int, verdict: Verdict) -> None:
        """What a worker had taken when it died is lost; its credits come back."""


def _source(packet: bytes) -> bytes:
    """The source address of an IP packet."""
    return packet[12:16] if packet[0] >> 4 == 4 else packet[8:24]
