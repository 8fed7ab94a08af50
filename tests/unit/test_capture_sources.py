"""A tap as a source of packets, on frames in memory: verdicts, counts, and interfaces that leave."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from fake_frames import ETHERNET, ETHERNET6, FakeRing, Frame
from frames_contract import ARP, TAG, TCP6, UDP

from nfq_agent.capture import tap
from nfq_agent.capture.following import Table
from nfq_agent.capture.selection import CaptureSelection
from nfq_agent.capture.tap import TapSource
from nfq_agent.counters import TAP_COUNTERS
from nfq_agent.flow import Watch
from nfq_agent.flow_table import FlowTable
from nfq_agent.host import packet_socket
from nfq_agent.host.ring import OUTGOING
from nfq_agent.packet import Hook, Packet
from nfq_agent.verdict import ACCEPT, DROP, WOULD_DROP, Action, RewriteError, Verdict, VerdictError

INTERFACE = 5


class TapBed:
    """A tap with one interface; `frames` come to its ring."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, selection: CaptureSelection) -> None:
        self.table = Table(tuple(TAP_COUNTERS), 4)
        self.ring = FakeRing(INTERFACE)
        self.lost = 0
        monkeypatch.setattr(tap, "Ring", lambda *_: self.ring)
        monkeypatch.setattr(packet_socket, "lost", lambda _: self.lost)
        self.source = TapSource(selection, self.table)
        ours, self.kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._readable = ours.dup()
        self._readable.setblocking(False)
        self.ring.emptied = self._drain
        self.control, self.supervisor = socket.socketpair()
        self.source.start(self.control.fileno())
        self.source.add(ours.detach(), str(INTERFACE), "2", "1500", "1048576")

    def arrive(self, *frames: Frame) -> None:
        self.ring.frames.extend(frames)
        self.kernel.send(b"x")

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._readable.recv(100)

    def counts(self) -> dict[str, int]:
        return {name: count for name, count in self.table.read(2).items() if count}

    def close(self) -> None:
        self.source.finish()
        for each in (self._readable, self.kernel, self.control, self.supervisor):
            each.close()


@pytest.fixture
def tap_bed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., TapBed]]:
    beds: list[TapBed] = []

    def make(*ports: tuple[int, int]) -> TapBed:
        beds.append(TapBed(monkeypatch, CaptureSelection(("*",), (), (), ports)))
        return beds[-1]

    yield make
    for bed in beds:
        bed.close()


class TestTap:
    def test_packets_are_read_with_direction_interface_and_time(self, tap_bed: Callable[..., TapBed]) -> None:
        bed = tap_bed()
        bed.arrive(Frame(ETHERNET + UDP), Frame(ETHERNET6 + TCP6, OUTGOING, 7.5), Frame(ARP))
        inward, outward = bed.source.read(9)
        assert (inward.hook, inward.indev, inward.outdev, inward.id, inward.gso) == (Hook.PREROUTING, 5, 0, 1, False)
        assert (outward.hook, outward.indev, outward.outdev, outward.id) == (Hook.POSTROUTING, 0, 5, 2)
        assert (outward.payload, outward.time, outward.hw_protocol) == (TCP6, 7.5, 0x86DD)
        assert bed.source.last == 2
        bed.source.answer([(inward, ACCEPT), (outward, WOULD_DROP)])
        bed.source.verdict(inward, DROP)
        assert bed.counts() == {"judged": 2, "would_drop": 1}
        assert bed.source.drops() == 0
        assert bed.counts()["unreadable"] == 1
        bed.lost = 3
        assert bed.source.drops() == 3

    def test_each_packet_of_a_block_has_its_own_moment(self, tap_bed: Callable[..., TapBed]) -> None:
        bed = tap_bed()
        begun, clock = time.monotonic(), time.time()
        bed.arrive(*(Frame(ETHERNET + UDP, 0, seconds) for seconds in (clock - 0.5, clock - 0.48, clock - 3600.0, 1.5)))
        first, second, *others = [bed.source.moment(packet) for packet in bed.source.read(9)]
        assert second - first == pytest.approx(0.02, abs=0.001)
        assert first == pytest.approx(begun - 0.5, abs=0.1)
        # The clock was set meanwhile.
        assert all(begun <= moment <= time.monotonic() for moment in others)

    def test_a_packet_longer_than_the_mtu_is_offloaded(self, tap_bed: Callable[..., TapBed]) -> None:
        bed = tap_bed()
        bed.arrive(Frame(ETHERNET + UDP[:2] + b"\x08\x00" + UDP[4:] + bytes(2000)))
        (packet,) = bed.source.read(1)
        assert packet.gso

    def test_what_the_filter_could_not_judge_is_compared_here(self, tap_bed: Callable[..., TapBed]) -> None:
        bed = tap_bed((53, 53))
        other = UDP[:22] + b"\x00\x50" + UDP[24:]
        later = UDP[:6] + b"\x00\x09" + UDP[8:]
        bed.arrive(
            Frame(TAG + UDP), Frame(TAG + other), Frame(ETHERNET + later), Frame(ETHERNET + b"\x4f" + UDP[1:]), Frame(TAG + UDP)
        )
        assert [packet.payload[0] for packet in bed.source.read(9)] == [0x45, 0x4F, 0x45]
        assert bed.counts() == {"judged": 3, "fragments": 1}

    def test_turns_look_verdicts_up_and_count_them(self, tap_bed: Callable[..., TapBed]) -> None:
        bed = tap_bed()
        known: dict[bytes, Verdict] = {}

        def decide(packet: Packet, key: bytes | None) -> Verdict:
            assert key is not None
            return known.setdefault(key, WOULD_DROP if packet.headers.version == 6 else ACCEPT)

        bed.source.be_patient(1.0)
        assert bed.source.sort(known, decide, 9, each=True) == (0, [])
        bed.arrive(Frame(ETHERNET + UDP), Frame(ETHERNET + UDP), Frame(ETHERNET6 + TCP6))
        assert bed.source.sort(known, decide, 9, each=True) == (3, [(0, 2, ACCEPT), (0, 1, WOULD_DROP)])
        assert bed.counts() == {"judged": 3, "would_drop": 1}
        bed.arrive(*[Frame(ETHERNET + UDP)] * 3)
        assert bed.source.skim(ACCEPT, 2) == 2
        assert bed.source.skim_each(ACCEPT, 2) == 1

    def test_turns_by_flows_count_what_the_flow_table_knows(self, tap_bed: Callable[..., TapBed]) -> None:
        bed = tap_bed()
        table = FlowTable()
        asked: list[Packet] = []

        def ask(packet: Packet) -> Verdict:
            asked.append(packet)
            if packet.headers.version == 6:
                return WOULD_DROP
            table.settle(Watch.NOTHING, table.observe(packet.headers.five_tuple, 1.0, packet.length), ACCEPT)
            return ACCEPT

        assert bed.source.judge(table, ask, 1.0, 9, each=True) == (0, [], None)
        bed.arrive(Frame(ETHERNET + UDP), Frame(ETHERNET + UDP), Frame(ETHERNET6 + TCP6), Frame(ETHERNET + UDP))
        runs = [(0, 2, ACCEPT), (0, 1, WOULD_DROP), (0, 1, ACCEPT)]
        assert bed.source.judge(table, ask, 1.0, 9, each=True) == (4, runs, None)
        assert [packet.indev for packet in asked] == [5, 5]
        assert bed.counts() == {"judged": 4, "would_drop": 1}
        assert not bed.source.must_answer_each

    def test_an_interface_that_leaves_is_read_to_its_end(
        self, tap_bed: Callable[..., TapBed], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bed = tap_bed()
        bed.source.gone("77")
        bed.source.gone(str(INTERFACE))
        bed.arrive(Frame(ETHERNET + UDP))
        assert len(bed.source.read(9)) == 1
        assert not bed.ring.closed
        later = time.monotonic() + 10
        monkeypatch.setattr(tap, "time", SimpleNamespace(monotonic=lambda: later, time=lambda: later))
        bed.source.wait(0)
        assert bed.ring.closed
        assert bed.source.read(9) == []

    def test_a_message_of_the_supervisor_ends_the_wait(self, tap_bed: Callable[..., TapBed]) -> None:
        bed = tap_bed()
        bed.supervisor.send(b"stop\n")
        assert bed.source.wait(5) == [bed.control.fileno()]

    def test_no_packet_of_a_tap_can_be_rewritten(self, tap_bed: Callable[..., TapBed]) -> None:
        bed = tap_bed()
        packet = Packet(UDP, id=3)
        bed.source.check(packet, ACCEPT)
        with pytest.raises(VerdictError, match="packet 3: 7 is not a verdict"):
            bed.source.check(packet, 7)
        with pytest.raises(RewriteError, match="packet 3 was seen by a tap and has left; it cannot be rewritten"):
            bed.source.check(packet, Verdict(Action.ACCEPT, payload=UDP))
