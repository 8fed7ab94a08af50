"""An inline link: frames of interfaces that wait for their verdict, and are then sent on or dropped. It runs in the worker.

The kernel passes everything when this process is gone (its links close), when it hangs (the heartbeat in a map goes stale) and
when it is slow (credits). What passes is counted there.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from typing import Final

from nfq_agent.answering import Answering
from nfq_agent.capture import link_maps
from nfq_agent.capture.following import Table
from nfq_agent.capture.source import InterfaceSource, Taken, packet_of
from nfq_agent.host import packet_socket
from nfq_agent.host.bpf import Map
from nfq_agent.host.frames import OUTGOING, SEGMENTED, UNFINISHED, Frames
from nfq_agent.packet import Packet, PacketError
from nfq_agent.verdict import WOULD_DROP, Action, Verdict, VerdictError

# Frames of a turn.
TURN: Final = 128
# Seconds without a packet after which missing credits are returned: their frames were lost.
_LOST_AFTER: Final = 0.2
_TO_CONTAINER: Final = 0x80000000
# At the end: how long no frame comes before it stops reading, and how long it waits at most for those that are on their way.
_DRAIN: Final = 0.02
_LONGEST_DRAIN: Final = 1.0


class _Linked(Taken):
    """One interface and its two links. A link exists as long as its descriptor, and only this process has it."""

    __slots__ = ("links",)

    def __init__(self, index: int, row: int, links: tuple[int, int]) -> None:
        super().__init__(index, row)
        self.links = links


class InlineSource(InterfaceSource[_Linked]):
    """The source of packets of one `[inline.NAME]`."""

    where = "is a frame that waits for its verdict"

    def __init__(self, opened: socket.socket, live: Map, flows: Map, patience: float, table: Table) -> None:
        """opened: the packet socket. live, flows: maps of the program. patience: seconds. table: counters by interface."""
        super().__init__(table)
        self._frames = Frames(opened.fileno(), TURN)
        self._socket = opened
        self._descriptor = opened.fileno()
        self._memory = mmap.mmap(live.descriptor, mmap.PAGESIZE)
        self._live = memoryview(self._memory).cast("Q")
        self._flows = flows
        self._beat_within = patience / 4
        self._poll.register(self._descriptor, select.EPOLLIN)
        self._held: dict[int, tuple[bytes, int]] = {}
        # The first frame of this turn without a verdict; the number of all where each has one.
        self._open = 0
        # The frame of a turn by flows whose verdict is given separately, by `answer`.
        self._special: int | None = None
        self._idle_since: tuple[float, tuple[int, int]] | None = None
        # Frames that found no room in the socket since all credits were here; frames that the program had counted on the way
        # back before the first frame of this process.
        self._without_room = 0
        self._back = 0
        self._ended = False

    # The interfaces.

    def add(self, ingress: int, egress: int, index: str, row: str) -> None:
        """Keep the links of an interface."""
        self._taken[int(index)] = _Linked(int(index), int(row), (ingress, egress))

    def _release(self, taken: _Linked) -> None:
        for descriptor in taken.links:
            os.close(descriptor)

    # Called by the worker's loop.

    def start(self, control: int) -> None:
        """Let `wait` return for this descriptor too; from now on the program sends packets here."""
        super().start(control)
        self._begin_count()
        self._beat()

    def _beat(self) -> None:
        if not self._ended:
            self._live[link_maps.HEARTBEAT] = time.monotonic_ns()

    def wait(self, timeout: float) -> list[int]:
        """Wait for packets or the control descriptor. Returns the readable descriptors."""
        self._beat()
        found = [descriptor for descriptor, _ in self._poll.poll(min(timeout, self._beat_within))]
        self._beat()
        if self._descriptor in found:
            self._idle_since = None
        else:
            self._give_back()
        return found

    def _give_back(self) -> None:
        """Return the credits of frames that were lost on the way here, once no packet has arrived for a while."""
        live = self._live
        moved, now = (live[link_maps.UP], live[link_maps.BACK]), time.monotonic()
        if self._held or self._open < self._frames.count or not self._unsettled:
            self._idle_since = None
        elif self._idle_since is None or self._idle_since[1] != moved:
            self._idle_since = now, moved
        elif now - self._idle_since[0] > _LOST_AFTER:
            self._lost += max(0, live[link_maps.UP] - live[link_maps.DOWN])
            live[link_maps.DOWN] = live[link_maps.UP]
            live[link_maps.DOWN_BYTES] = live[link_maps.UP_BYTES]
            self._begin_count()
            self._idle_since = None

    def _begin_count(self) -> None:
        """Count from here on what is on its way: nothing is now, or it was lost."""
        packet_socket.lost(self._socket)
        self._without_room = 0
        self._back = self._live[link_maps.BACK] - self._frames.crossed

    @property
    def _unsettled(self) -> bool:
        """Whether what the program sent here and what came from here differ, or the same for the way back."""
        live = self._live
        return live[link_maps.UP] != live[link_maps.DOWN] or live[link_maps.BACK] - self._back != self._frames.crossed

    def _on_its_way(self) -> bool:
        """Whether frames may be on their way here or back: the kernel's softirqs wait for a processor as others do."""
        live = self._live
        self._without_room += packet_socket.lost(self._socket)
        coming = live[link_maps.UP] - live[link_maps.DOWN] - self._without_room
        return coming > 0 or live[link_maps.BACK] - self._back < self._frames.crossed

    def _receive(self, budget: int) -> int:
        self._beat()
        try:
            return self._frames.receive(budget)
        except OSError:
            # The kernel could not describe one frame. It has removed it, and the next call reads the frame after it.
            return 0

    def _packet(self, number: int) -> Packet | None:
        found = self._frames.packet(number)
        if found is None:
            return None
        payload, flags, kind, interface = found
        return packet_of(
            payload,
            interface,
            outgoing=bool(flags & OUTGOING),
            id=self._last - self._frames.count + number + 1,
            hw_protocol=kind,
            gso=bool(flags & SEGMENTED),
            checksum_ready=not flags & UNFINISHED,
            time=time.time(),
        )

    def _begin_turn(self, budget: int) -> int:
        """The number of frames of a turn: of the present one while it has frames without a verdict, from `_open` on."""
        count = self._frames.count
        if self._open >= count:
            count = self._receive(budget)
            self._last += count
            self._open = 0
        return count

    def read(self, budget: int) -> list[Packet]:
        """Up to `budget` packets."""
        count = self._begin_turn(budget)
        packets = [packet for number in range(self._open, count) if (packet := self._packet(number)) is not None]
        if count and not packets:
            self.answer(())
        return packets

    def check(self, packet: Packet, verdict: object) -> None:
        """Raise VerdictError unless it is a verdict that can be given here, RewriteError for new bytes."""
        super().check(packet, verdict)
        if isinstance(verdict, Verdict) and verdict.action is Action.QUEUE:
            raise VerdictError(f"packet {packet.id}: there is no other queue for a packet of an interface")

    def answer(self, answers: Sequence[tuple[Packet, Verdict]]) -> None:
        """Forward the accepted packets and the packets of `Verdict.inject`; keep the retained ones."""
        frames = self._frames
        if self._special is None:
            # A frame in which no packet was found is sent on.
            going = bytearray(self._open) + b"\1" * (frames.count - self._open)
            self._open = frames.count
        else:
            going = bytearray(frames.count)
            self._special = None
        first = self._last - frames.count + 1
        decided = []
        for packet, verdict in answers:
            number = packet.id - first
            if verdict.action is Action.RETAIN:
                self._held[packet.id] = frames.frame(number)
                going[number] = 0
                continue
            going[number] = verdict.outcome is not Action.DROP
            self._count_verdicts(packet.indev or packet.outdev, verdict, 1)
            if verdict.means is not None:
                decided.append((packet, verdict))
            for other in verdict.inject:
                self._inject(packet, frames.frame(number)[0], other)
        self._remember(decided)
        self._lost += frames.send(going)
        self._finish_turn()

    def _finish_turn(self) -> None:
        """Return the credits of this turn, once each of its frames has its verdict."""
        self._beat()
        if self._open < self._frames.count:
            return
        live = self._live
        live[link_maps.DOWN] += self._frames.count
        live[link_maps.DOWN_BYTES] += self._frames.size

    def _count_verdicts(self, interface: int, verdict: Verdict, number: int) -> None:
        self._count(interface, "judged", number)
        if verdict.outcome is Action.DROP:
            self._count(interface, "dropped", number)
        elif verdict is WOULD_DROP:
            self._count(interface, "would_drop", number)

    def _remember(self, decided: Sequence[tuple[Packet, Verdict]]) -> None:
        """Let the kernel decide the rest of these flows: before their packets are forwarded, so that the answer finds it."""
        now = time.monotonic_ns()
        entries = {}
        for packet, verdict in decided:
            interface, accept = packet.indev or packet.outdev, verdict.means is not Action.DROP
            with contextlib.suppress(PacketError):
                key, value = link_maps.flow_entry(interface, packet.headers.five_tuple, packet.indev != 0, accept, now)
                entries[key] = value
        # Without room there they are still judged packet by packet.
        with contextlib.suppress(OSError):
            self._flows.put_all(entries)

    def _inject(self, packet: Packet, frame: bytes, other: bytes) -> None:
        """Send a packet of ours (a reset, an unreachable) as a frame: towards the sender with swapped addresses, onwards with
        the same ones.

        This needs no route and no address of the host: it works on a bridge without an address.
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
        self._count_verdicts(packet.indev or packet.outdev, verdict, 1)
        if verdict.outcome is not Action.DROP:
            self._lost += self._frames.put(*held)

    def finish(self) -> None:
        """Let everything pass: first new packets, then those that wait here or are on their way.

        The links close last: the programs take the mark off what comes back, and what is on the pair would go with it.
        """
        self._ended = True
        self._live[link_maps.HEARTBEAT] = 0
        for held in self._held.values():
            self.unanswered += 1
            self._frames.put(*held)
        self._held.clear()
        if rest := self._frames.count - self._open:
            self.unanswered += rest
            self._special = None
            self.answer(())
        begun = quiet = time.monotonic()
        while (now := time.monotonic()) < quiet + _DRAIN or (self._on_its_way() and now < begun + _LONGEST_DRAIN):
            if count := self._receive_any():
                self.unanswered += count
                self._lost += self._frames.send(b"\1" * count)
                self._live[link_maps.DOWN] += count
                self._live[link_maps.DOWN_BYTES] += self._frames.size
                quiet = time.monotonic()
            else:
                time.sleep(0.001)
        for index in list(self._taken):
            self.gone(str(index))

    def _receive_any(self) -> int:
        try:
            return self._frames.receive(TURN)
        except OSError:
            return 0

    def drops(self) -> int:
        """Frames that did not arrive here, or could not be sent on."""
        return self._lost

    # The turns without an object for each packet.

    def skim(self, verdict: Verdict, budget: int) -> int:
        """Give up to `budget` packets the same verdict."""
        count = self._receive(budget)
        self._last += count
        self._open = count
        if count:
            self._answer_turn({}, lambda _number, _key: verdict)
        return count

    def _sort(
        self, known: dict[bytes, Verdict], decide: Callable[[Packet, bytes | None], Verdict], budget: int
    ) -> tuple[int, list[tuple[int, int, Verdict]]]:
        count = self._receive(budget)
        if not count:
            return 0, []
        self._last += count
        self._open = count

        def ask(number: int, key: bytes | None) -> Verdict:
            packet = self._packet(number)
            assert packet is not None
            return decide(packet, key)

        runs = self._answer_turn(known, ask)
        return sum(number for _, number, _ in runs), [(self._last, number, verdict) for verdict, number, _ in runs]

    def _answer_turn(
        self, known: dict[bytes, Verdict], decide: Callable[[int, bytes | None], Verdict]
    ) -> list[tuple[Verdict, int, int]]:
        """Answer this turn's frames. Returns runs of equal verdicts at one interface."""
        runs: list[tuple[Verdict, int, int]] = []
        self._lost += self._frames.send(self._frames.sort(known, decide, runs))
        for verdict, number, interface in runs:
            self._count_verdicts(interface, verdict, number)
        self._finish_turn()
        return runs

    # The turns by flows (see `FlowQueue`).

    # A packet that is retained is kept apart.
    must_answer_each = False

    def judge(
        self, table: Answering, ask: Callable[[Packet], Verdict], now: float, budget: int, each: bool = False
    ) -> tuple[int, list[tuple[int, int, Verdict]], tuple[Packet, Verdict] | None]:
        """Answer up to `budget` packets with the verdicts of their flows. Returns as `FlowQueue.judge` does."""
        frames = self._frames
        if each and self._open >= frames.count:
            self._wait_for_packets()
        count = self._begin_turn(budget)
        if not count:
            return 0, [], None
        going = bytearray(count)
        runs: list[tuple[Verdict, int, int]] = []
        kept: list[tuple[int, Verdict]] = []
        begun = self._open
        self._open, left = frames.judge(begun, table, now, self._made, ask, going, runs, kept)
        if kept:
            self._remember([(self._made(number), verdict) for number, verdict in kept])
        self._lost += frames.send(going)
        for verdict, number, interface in runs:
            self._count_verdicts(interface, verdict, number)
        if left is None:
            self._finish_turn()
        else:
            self._special = self._open
            self._open += 1
        return sum(number for _, number, _ in runs) + (left is not None), [(self._last, n, v) for v, n, _ in runs], left

    def _made(self, number: int) -> Packet:
        packet = self._packet(number)
        assert packet is not None
        return packet


def _source(packet: bytes) -> bytes:
    """The source address of an IP packet."""
    return packet[12:16] if packet[0] >> 4 == 4 else packet[8:24]
