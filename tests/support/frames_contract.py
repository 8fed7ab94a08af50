"""What a ring and the frames of an inline link do: the compiled ones and the ones in memory pass the same functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from fake_frames import ETHERNET, ETHERNET6, TO_CONTAINER, Frame, Seen, key_of

from nfq_agent.answering import Answering
from nfq_agent.flow import Account, Watch
from nfq_agent.flow_table import FlowTable
from nfq_agent.host.ring import ODD, OUTGOING, SEGMENTED, TAGGED, UNFINISHED
from nfq_agent.packet import Packet
from nfq_agent.testing import icmp, tcp, udp
from nfq_agent.verdict import ACCEPT, DROP, Action, Verdict

UDP = udp("192.0.2.1:40000", "192.0.2.2:53", b"x").payload
TCP6 = tcp("[2001:db8::1]:40000", "[2001:db8::2]:80", b"y").payload
PING = icmp("192.0.2.1", "192.0.2.2").payload
TAG = ETHERNET[:12] + b"\x81\0\0\x05\x08\0"
ARP = ETHERNET[:12] + b"\x08\x06" + bytes(28)


class AnyRing(Protocol):
    unknown: int

    def close(self) -> None: ...
    def read(self, budget: int) -> list[Seen]: ...
    def sort(
        self,
        budget: int,
        known: dict[bytes, Verdict],
        decide: Callable[[Seen, bytes | None], Verdict | None],
        runs: list[tuple[Verdict, int]],
    ) -> int: ...
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
    ) -> tuple[int, bool, tuple[Packet, Verdict] | None]: ...


def a_ring_reads_its_frames_in_order(ring_of: Callable[[Sequence[Frame], int], AnyRing]) -> None:
    frames = [
        Frame(ETHERNET + UDP), Frame(ARP), Frame(ETHERNET6 + TCP6, OUTGOING, 2.25), Frame(TAG + UDP),
        Frame(ETHERNET + PING, UNFINISHED | SEGMENTED), Frame(ETHERNET[:5]),
    ]  # fmt: skip
    ring = ring_of(frames, 3)
    assert ring.read(2) == [(UDP, len(UDP), 1.5, 0, 0x0800), (TCP6, len(TCP6), 2.25, OUTGOING, 0x86DD)]
    assert ring.read(9) == [
        (UDP, len(UDP), 1.5, TAGGED | ODD, 0x0800),
        (PING, len(PING), 1.5, UNFINISHED | SEGMENTED | ODD, 0x0800),
    ]
    assert ring.unknown == 2
    assert ring.read(9) == []
    ring.close()
    assert ring.read(9) == []


def a_ring_looks_verdicts_up(ring_of: Callable[[Sequence[Frame], int], AnyRing]) -> None:
    ring = ring_of([Frame(ETHERNET + UDP)] * 3 + [Frame(ETHERNET + PING), Frame(ETHERNET + UDP, OUTGOING), Frame(TAG + UDP)], 3)
    known: dict[bytes, Verdict] = {}
    asked: list[tuple[int, bytes | None]] = []

    def decide(seen: Seen, key: bytes | None) -> Verdict | None:
        asked.append((seen[3], key))
        if key is None:
            return None if seen[3] & TAGGED else DROP
        known[key] = ACCEPT
        return ACCEPT

    runs: list[tuple[Verdict, int]] = []
    assert ring.sort(2, known, decide, runs) == 2
    assert runs == [(ACCEPT, 2)]
    assert ring.sort(9, known, decide, runs) == 3
    assert runs == [(ACCEPT, 2), (ACCEPT, 1), (DROP, 1), (ACCEPT, 1)]
    inward, outward = key_of(UDP, False, 3, 3), key_of(UDP, True, 3, 3)
    assert asked == [(0, inward), (ODD, None), (OUTGOING, outward), (TAGGED | ODD, None)]


def a_ring_judges_by_flows(ring_of: Callable[[Sequence[Frame], int], AnyRing]) -> None:
    other = tcp("192.0.2.1:40001", "192.0.2.2:80", b"z").payload
    frames = [Frame(ETHERNET + UDP)] * 2 + [Frame(ETHERNET + UDP, 0, 1.75)]
    frames += [Frame(TAG + UDP), Frame(ETHERNET + PING), Frame(ARP), Frame(ETHERNET + other)]
    ring = ring_of(frames, 3)
    table = FlowTable()
    delayed = Verdict(Action.ACCEPT, delay=1.0)
    asked: list[bytes] = []

    def make(seen: Seen) -> Packet | None:
        return None if seen[3] & TAGGED else Packet(seen[0], length=seen[1])

    def ask(packet: Packet) -> Verdict:
        asked.append(packet.payload)
        if packet.payload == other:
            return delayed
        if packet.payload == UDP:
            table.settle(Watch.NOTHING, table.observe(packet.headers.five_tuple, 1.0, packet.length), ACCEPT)
            return ACCEPT
        return DROP

    runs: list[tuple[Verdict, int]] = []
    assert ring.judge(2, table, 1.0, 0.5, 1500, make, ask, runs) == (2, True, None)
    assert (runs, asked) == ([(ACCEPT, 2)], [UDP])
    count, more, left = ring.judge(9, table, 1.0, 0.5, 1500, make, ask, runs)
    # A flow is as old as its latest frame, by the clock of the frames, which is half a second ahead.
    flow = table.find(Packet(UDP).headers.five_tuple)
    assert flow is not None
    assert table.account(flow) == Account(3, 3 * len(UDP), 0, 0, 1.25)
    # The tagged one is left out; the last one needs more than an answer.
    assert (count, more, runs, asked) == (2, True, [(ACCEPT, 2), (ACCEPT, 1), (DROP, 1)], [UDP, PING, other])
    assert left is not None
    assert (left[0].payload, left[1]) == (other, delayed)
    assert ring.judge(9, table, 1.0, 0.5, 1500, make, ask, runs) == (0, False, None)


class AnyFrames(Protocol):
    count: int
    size: int
    crossed: int

    def receive(self, budget: int) -> int: ...
    def packet(self, number: int) -> tuple[bytes, int, int, int] | None: ...
    def frame(self, number: int) -> tuple[bytes, int]: ...
    def sort(
        self,
        known: dict[bytes, Verdict],
        decide: Callable[[int, bytes | None], Verdict],
        runs: list[tuple[Verdict, int, int]],
    ) -> bytearray: ...
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
    ) -> tuple[int, tuple[Packet, Verdict] | None]: ...
    def send(self, going: bytes | bytearray) -> int: ...


class FramesWorld(Protocol):
    """frames: those under test. arrive: let frames wait. sent: (frame with its virtio header, interface) of those sent on."""

    @property
    def frames(self) -> AnyFrames: ...
    def arrive(self, *frames: Frame) -> None: ...
    def sent(self) -> list[tuple[bytes, int]]: ...


def frames_are_read_judged_and_sent_on(world: FramesWorld) -> None:
    frames = world.frames
    assert frames.receive(8) == 0
    world.arrive(
        Frame(ETHERNET + UDP, mark=5), Frame(ETHERNET + UDP, mark=5), Frame(ARP, mark=5), Frame(ETHERNET6 + TCP6, mark=6),
        Frame(ETHERNET + PING, UNFINISHED | SEGMENTED, mark=6), Frame(ETHERNET + UDP, mark=6 | TO_CONTAINER),
    )  # fmt: skip
    assert frames.receive(8) == frames.count == 6
    assert frames.size == 14 * 5 + 3 * len(UDP) + len(ARP) + len(TCP6) + len(PING)
    assert [frames.packet(number) for number in range(6)] == [
        (UDP, 0, 0x0800, 5), (UDP, 0, 0x0800, 5), None, (TCP6, 0, 0x86DD, 6), (PING, UNFINISHED | SEGMENTED, 0x0800, 6),
        (UDP, OUTGOING, 0x0800, 6),
    ]  # fmt: skip
    assert frames.frame(3) == (bytes(10) + ETHERNET6 + TCP6, 6)
    known: dict[bytes, Verdict] = {}
    asked: list[int] = []

    def decide(number: int, key: bytes | None) -> Verdict:
        asked.append(number)
        verdict = DROP if number == 3 else ACCEPT
        if key is not None:
            known[key] = verdict
        return verdict

    runs: list[tuple[Verdict, int, int]] = []
    going = frames.sort(known, decide, runs)
    assert asked == [0, 3, 4, 5]
    assert set(known) == {key_of(UDP, False, 5, 0), key_of(TCP6, False, 6, 0), key_of(UDP, True, 0, 6)}
    assert runs == [(ACCEPT, 2, 5), (DROP, 1, 6), (ACCEPT, 2, 6)]
    assert going == b"\1\1\1\0\1\1"
    # The last one is for an interface of a container, which the test's socket has not.
    assert frames.send(going[:5]) == 0
    assert [(frame[10:], interface) for frame, interface in world.sent()] == [
        (ETHERNET + UDP, 5), (ETHERNET + UDP, 5), (ARP, 5), (ETHERNET + PING, 6),
    ]  # fmt: skip
    assert frames.crossed == 4


def frames_are_judged_by_flows(world: FramesWorld) -> None:
    frames = world.frames
    other = tcp("192.0.2.1:40001", "192.0.2.2:80", b"z").payload
    world.arrive(
        Frame(ETHERNET + UDP, mark=5), Frame(ETHERNET + UDP, mark=5), Frame(ARP, mark=5), Frame(ETHERNET + UDP, mark=6),
        Frame(ETHERNET + PING, mark=6), Frame(ETHERNET + other, mark=6), Frame(ETHERNET + UDP, mark=6),
    )  # fmt: skip
    assert frames.receive(8) == 7
    table = FlowTable()
    delayed, kept_drop = Verdict(Action.ACCEPT, delay=1.0), Verdict(Action.REPEAT, mark=1, means=Action.DROP)
    asked: list[bytes] = []

    def make(number: int) -> Packet:
        found = frames.packet(number)
        assert found is not None
        return Packet(found[0], id=number)

    def ask(packet: Packet) -> Verdict:
        asked.append(packet.payload)
        if packet.payload == UDP:
            table.settle(Watch.NOTHING, table.observe(packet.headers.five_tuple, 1.0, packet.length), ACCEPT)
            return ACCEPT
        return delayed if packet.payload == other else kept_drop

    going = bytearray(7)
    runs: list[tuple[Verdict, int, int]] = []
    kept: list[tuple[int, Verdict]] = []
    end, left = frames.judge(0, table, 1.0, make, ask, going, runs, kept)
    assert (end, asked) == (5, [UDP, PING, other])
    assert left is not None
    assert (left[0].id, left[1]) == (5, delayed)
    assert runs == [(ACCEPT, 2, 5), (ACCEPT, 1, 6), (kept_drop, 1, 6)]
    assert kept == [(4, kept_drop)]
    # Not yet those from the one on whose verdict is more than an answer.
    assert going == b"\1\1\1\1\0\0\0"
    assert frames.send(going) == 0
    going = bytearray(7)
    assert frames.judge(6, table, 1.0, make, ask, going, runs, kept) == (7, None)
    assert frames.send(going) == 0
    assert [(frame[10:], interface) for frame, interface in world.sent()] == [
        (ETHERNET + UDP, 5), (ETHERNET + UDP, 5), (ARP, 5), (ETHERNET + UDP, 6), (ETHERNET + UDP, 6),
    ]  # fmt: skip
