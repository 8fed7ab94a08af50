"""Frames in memory in place of packet sockets: a ring for a tap, and the frames of an inline link.

The compiled ones pass the same contract (frames_contract.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from nfq_agent.answering import Answering
from nfq_agent.flow_table import FlowTable
from nfq_agent.host.ring import ODD, OUTGOING, SEGMENTED, TAGGED, UNFINISHED, moment
from nfq_agent.packet import Packet
from nfq_agent.verdict import Verdict

# A packet as a ring gives it: payload, whole length, time, flags, ethertype.
Seen = tuple[bytes, int, float, int, int]
ETHERNET = bytes.fromhex("0200000000010200000000020800")
ETHERNET6 = ETHERNET[:12] + b"\x86\xdd"
TO_CONTAINER = 0x80000000


class Frame(NamedTuple):
    """One frame as the kernel gives it. seconds: its time. mark: interface, and TO_CONTAINER, of an inline link."""

    data: bytes
    flags: int = 0
    seconds: float = 1.5
    mark: int = 0


def packet_in(data: bytes) -> tuple[bytes, int, int] | None:
    """(packet, ethertype, flags) of a frame; None if it holds no IP packet."""
    offset, kind, flags = 14, int.from_bytes(data[12:14], "big"), 0
    while kind in (0x8100, 0x88A8) and offset <= 18:
        offset, kind, flags = offset + 4, int.from_bytes(data[offset + 2 : offset + 4], "big"), TAGGED | ODD
    return (data[offset:], kind, flags) if kind in (0x0800, 0x86DD) else None


def key_of(packet: bytes, outgoing: bool, indev: int, outdev: int) -> bytes | None:
    """The key of a whole TCP or UDP packet with plain headers."""
    place = bytes((4 if outgoing else 0,)) + indev.to_bytes(4, "little") + outdev.to_bytes(4, "little")
    if len(packet) >= 24 and packet[0] == 0x45 and packet[9] in (6, 17) and not packet[6] & 0xBF and not packet[7]:
        return place + packet[9:10] + packet[12:24]
    if len(packet) >= 44 and packet[0] >> 4 == 6 and packet[6] in (6, 17):
        return place + packet[6:7] + packet[8:44]
    return None


def add_run(runs: list[tuple[Verdict, int]], verdict: Verdict) -> None:
    """One more of this verdict."""
    if runs and runs[-1][0] is verdict:
        runs[-1] = verdict, runs[-1][1] + 1
    else:
        runs.append((verdict, 1))


class FakeRing:
    """See host/ring.pyx."""

    def __init__(self, interface: int) -> None:
        self.frames: deque[Frame] = deque()
        self.unknown = 0
        self.closed = False
        # Called when it is read to its end: the socket is not readable then.
        self.emptied: Callable[[], object] = lambda: None
        self._interface = interface

    def close(self) -> None:
        self.closed = True
        self.frames.clear()

    def _next(self) -> tuple[Seen, bytes | None] | None:
        while self.frames:
            frame = self.frames.popleft()
            found = packet_in(frame.data)
            if found is None:
                self.unknown += 1
                continue
            packet, kind, flags = found
            flags |= frame.flags
            key = key_of(packet, bool(flags & OUTGOING), self._interface, self._interface)
            if key is None:
                flags |= ODD
            return (packet, len(packet), frame.seconds, flags, kind), None if flags & ODD else key
        self.emptied()
        return None

    def read(self, budget: int) -> list[Seen]:
        packets: list[Seen] = []
        while len(packets) < budget and (found := self._next()) is not None:
            packets.append(found[0])
        return packets

    def sort(
        self,
        budget: int,
        known: dict[bytes, Verdict],
        decide: Callable[[Seen, bytes | None], Verdict | None],
        runs: list[tuple[Verdict, int]],
    ) -> int:
        count = 0
        ours: list[tuple[Verdict, int]] = []
        while count < budget and (found := self._next()) is not None:
            seen, key = found
            verdict = known.get(key) if key is not None else None
            if verdict is None:
                verdict = decide(seen, key)
            if verdict is not None:
                add_run(ours, verdict)
                count += 1
        runs += ours
        return count

    def judge(
        self,
        budget: int,
        table: Answering,
        now: float,
        ahead: float,
        mtu: int,
        make: Callable[[Seen], Packet | None],
        ask: Callable[[Packet], Verdict],
        runs: list[tuple[Verdict, int]],
    ) -> tuple[int, bool, tuple[Packet, Verdict] | None]:
        assert isinstance(table, FlowTable)
        count = 0
        ours: list[tuple[Verdict, int]] = []
        more, special = True, None
        while count < budget:
            if (found := self._next()) is None:
                more = False
                break
            seen, key = found
            payload, length, seconds, flags, _ = seen
            ready = not flags & (UNFINISHED | SEGMENTED) and length <= mtu
            verdict = (
                None
                if key is None
                else table.look_up(
                    payload, length, moment(seconds, ahead, now), ready, joined=bool(flags & SEGMENTED) or length > mtu
                )
            )
            if verdict is None:
                packet = make(seen)
                if packet is None:
                    continue
                verdict = ask(packet)
                if verdict.delay or verdict.inject:
                    special = packet, verdict
                    break
            add_run(ours, verdict)
            count += 1
        runs += ours
        return count, more, special


class FakeFrames:
    """See host/frames.pyx. waiting: the frames to receive. sent: (frame, mark) of those that were sent on."""

    def __init__(self) -> None:
        self.waiting: deque[Frame] = deque()
        self.sent: list[tuple[bytes, int]] = []
        self.unsendable = False
        self.count = self.size = self.failed = self.crossed = 0
        self._turn: list[Frame] = []
        # Called when a turn is sent on.
        self.before_send: Callable[[], object] = lambda: None
        # Called when a frame is sent over the pair.
        self.on_crossing: Callable[[], object] = lambda: None

    def receive(self, budget: int) -> int:
        self._turn = [self.waiting.popleft() for _ in range(min(budget, len(self.waiting)))]
        self.count = len(self._turn)
        self.size = sum(len(frame.data) for frame in self._turn)
        return self.count

    def packet(self, number: int) -> tuple[bytes, int, int, int] | None:
        frame = self._turn[number]
        found = packet_in(frame.data) if frame.mark else None
        if found is None:
            return None
        packet, kind, flags = found
        flags |= frame.flags & (UNFINISHED | SEGMENTED) | (OUTGOING if frame.mark & TO_CONTAINER else 0)
        return packet, flags, kind, frame.mark & ~TO_CONTAINER

    def frame(self, number: int) -> tuple[bytes, int]:
        frame = self._turn[number]
        virtio = bytes((1 if frame.flags & UNFINISHED else 0, 1 if frame.flags & SEGMENTED else 0)) + bytes(8)
        return virtio + frame.data, frame.mark

    def sort(
        self,
        known: dict[bytes, Verdict],
        decide: Callable[[int, bytes | None], Verdict],
        runs: list[tuple[Verdict, int, int]],
    ) -> bytearray:
        going = bytearray(self.count)
        for number in range(self.count):
            found = self.packet(number)
            if found is None:
                going[number] = 1
                continue
            packet, flags, _, interface = found
            outgoing = bool(flags & OUTGOING)
            key = key_of(packet, outgoing, 0 if outgoing else interface, interface if outgoing else 0)
            verdict = known.get(key) if key is not None else None
            if verdict is None:
                verdict = decide(number, key)
            if runs and runs[-1][0] is verdict and runs[-1][2] == interface:
                runs[-1] = verdict, runs[-1][1] + 1, interface
            else:
                runs.append((verdict, 1, interface))
            going[number] = verdict.outcome != 0
        return going

    def judge(
        self,
        first: int,
        table: Answering,
        now: float,
        make: Callable[[int], Packet],
        ask: Callable[[Packet], Verdict],
        going: bytearray,
        runs: list[tuple[Verdict, int, int]],
        kept: list[tuple[int, Verdict]],
    ) -> tuple[int, tuple[Packet, Verdict] | None]:
        assert isinstance(table, FlowTable)
        for number in range(first, self.count):
            found = self.packet(number)
            if found is None:
                going[number] = 1
                continue
            payload, flags, _, interface = found
            key = key_of(payload, False, interface, 0)
            ready = not flags & (UNFINISHED | SEGMENTED)
            verdict = None if key is None else table.look_up(payload, len(payload), now, ready, joined=bool(flags & SEGMENTED))
            if verdict is None:
                packet = make(number)
                verdict = ask(packet)
                if verdict.delay or verdict.inject:
                    return number, (packet, verdict)
            if runs and runs[-1][0] is verdict and runs[-1][2] == interface:
                runs[-1] = verdict, runs[-1][1] + 1, interface
            else:
                runs.append((verdict, 1, interface))
            going[number] = verdict.outcome != 0
            if verdict.means is not None:
                kept.append((number, verdict))
        return self.count, None

    def send(self, going: bytes | bytearray) -> int:
        self.before_send()
        chosen = [number for number in range(min(self.count, len(going))) if going[number] and self._turn[number].mark]
        return sum(self.put(*self.frame(number)) for number in chosen)

    def put(self, frame: bytes, mark: int) -> int:
        if self.unsendable:
            self.failed += 1
            return 1
        self.sent.append((frame, mark))
        if not mark & TO_CONTAINER:
            self.crossed += 1
            self.on_crossing()
        return 0
