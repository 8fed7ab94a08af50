"""Tap and inline link as sources of packets, on frames in memory: verdicts, counts, credits, and interfaces that leave."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fake_frames import ETHERNET, ETHERNET6, TO_CONTAINER, FakeFrames, FakeRing, Frame
from frames_contract import ARP, PING, TAG, TCP6, UDP

from nfq_agent.capture import inline, link_maps, tap
from nfq_agent.capture.following import Table
from nfq_agent.capture.inline import InlineSource
from nfq_agent.capture.selection import CaptureSelection
from nfq_agent.capture.tap import TapSource
from nfq_agent.counters import TAP_COUNTERS
from nfq_agent.flow import Watch
from nfq_agent.flow_table import FlowTable
from nfq_agent.host import packet_socket
from nfq_agent.host.ring import OUTGOING
from nfq_agent.packet import Hook, Packet
from nfq_agent.verdict import ACCEPT, DROP, RETAIN, WOULD_DROP, Action, RewriteError, Verdict, VerdictError

INTERFACE = 5


class TapBed:
    """A tap with one interface; `frames` come to its ring."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, selection: CaptureSelection) -> None:
        self.table = Table(tuple(TAP_COUNTERS), 4)
        self.ring = FakeRing(INTERFACE)
        self.lost = 0
        monkeypatch.setattr(tap, "Ring", lambda *_: self.ring)
        monkeypatch.setattr(packet_socket, "lost", lambda _: self.lost)
        self.source = TapSource(selection, 1 << 20, self.table)
        ours, self.kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._readable = ours.dup()
        self._readable.setblocking(False)
        self.ring.emptied = self._drain
        self.control, self.supervisor = socket.socketpair()
        self.source.start(self.control.fileno())
        self.source.add(ours.detach(), str(INTERFACE), "2", "1500")

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
        monkeypatch.setattr(tap, "time", SimpleNamespace(monotonic=lambda: later))
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


class InlineBed:
    """An inline link with one interface, and the memory that its programs share with it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.frames = FakeFrames()
        monkeypatch.setattr(inline, "Frames", lambda *_: self.frames)
        self._memory = os.memfd_create("live")
        os.ftruncate(self._memory, mmap.PAGESIZE)
        self.remembered: dict[bytes, bytes] = {}
        live: Any = SimpleNamespace(descriptor=self._memory)
        flows: Any = SimpleNamespace(put=self.remembered.__setitem__)
        self.table = Table(("judged", "dropped", "would_drop"), 4)
        self._socket, self.kernel = socket.socketpair()
        self.control, self.supervisor = socket.socketpair()
        self.source = InlineSource(self._socket.fileno(), live, flows, 0.4, self.table)
        self.source.start(self.control.fileno())
        self.links = os.pipe()
        self.source.add(*self.links, str(INTERFACE), "1")
        mapped = mmap.mmap(self._memory, mmap.PAGESIZE)
        self.live = memoryview(mapped).cast("Q")

    def arrive(self, *frames: Frame) -> None:
        self.frames.waiting.extend(frames)
        self.live[link_maps.UP] += len(frames)
        self.live[link_maps.UP_BYTES] += sum(len(frame.data) for frame in frames)

    def passed(self) -> list[bytes]:
        """The packets that were sent on since the last call, without their headers."""
        sent, self.frames.sent = self.frames.sent, []
        return [frame[24:] for frame, _ in sent]

    def counts(self) -> dict[str, int]:
        return {name: count for name, count in self.table.read(1).items() if count}

    @property
    def credits(self) -> tuple[int, int]:
        """Frames and bytes on their way, by the counts of both sides."""
        live = self.live
        return live[link_maps.UP] - live[link_maps.DOWN], live[link_maps.UP_BYTES] - live[link_maps.DOWN_BYTES]

    def close(self) -> None:
        for each in (self._socket, self.kernel, self.control, self.supervisor):
            each.close()
        os.close(self._memory)


@pytest.fixture
def bed(monkeypatch: pytest.MonkeyPatch) -> Iterator[InlineBed]:
    made = InlineBed(monkeypatch)
    yield made
    made.close()


def frame(payload: bytes = UDP, out: bool = False) -> Frame:
    return Frame(ETHERNET + payload, mark=INTERFACE | (TO_CONTAINER if out else 0))


class TestInline:
    def test_each_frame_is_sent_on_or_dropped_and_its_credit_returns(self, bed: InlineBed) -> None:
        bed.arrive(frame(), frame(PING), Frame(ARP, mark=INTERFACE), frame(out=True))
        first, second, third = bed.source.read(9)
        assert (first.hook, first.indev, first.outdev, third.hook, third.outdev) == (0, 5, 0, Hook.POSTROUTING, 5)
        assert [first.id, second.id, third.id] == [1, 2, 4]
        bed.source.answer([(first, ACCEPT), (second, DROP), (third, WOULD_DROP)])
        # What is not an IP packet is never dropped.
        assert bed.passed() == [UDP, ARP[14:], UDP]
        assert bed.counts() == {"judged": 3, "dropped": 1, "would_drop": 1}
        assert bed.credits == (0, 0)
        bed.arrive(Frame(ARP, mark=INTERFACE))
        assert bed.source.read(9) == []
        assert bed.passed() == [ARP[14:]]
        assert bed.credits == (0, 0)

    def test_a_retained_frame_waits_for_its_verdict(self, bed: InlineBed) -> None:
        bed.arrive(frame(), frame(PING), frame())
        packets = bed.source.read(9)
        bed.source.answer([(packet, RETAIN) for packet in packets])
        assert bed.passed() == []
        bed.source.verdict(packets[0], ACCEPT)
        bed.source.verdict(packets[1], DROP)
        assert bed.passed() == [UDP]
        with pytest.raises(VerdictError, match="packet 1 has its verdict already"):
            bed.source.verdict(packets[0], DROP)
        bed.source.finish()
        assert bed.passed() == [UDP]
        assert bed.source.unanswered == 1

    def test_a_verdict_with_packets_sends_them_as_frames(self, bed: InlineBed) -> None:
        bed.arrive(frame())
        (packet,) = bed.source.read(1)
        answer = UDP[:12] + UDP[16:20] + UDP[12:16] + UDP[20:]
        bed.source.answer([(packet, Verdict(Action.DROP, inject=(answer, UDP)))])
        # Back with swapped addresses, to the container; onwards with the same ones.
        swapped = ETHERNET[6:12] + ETHERNET[:6] + ETHERNET[12:]
        assert [(sent[10:], mark) for sent, mark in bed.frames.sent] == [
            (swapped + answer, INTERFACE | TO_CONTAINER), (ETHERNET + UDP, INTERFACE),
        ]  # fmt: skip
        bed.frames.unsendable = True
        bed.arrive(frame())
        (packet,) = bed.source.read(1)
        bed.source.answer([(packet, Verdict(Action.ACCEPT, inject=(answer,)))])
        assert bed.source.drops() == 2

    def test_a_verdict_for_the_flow_is_left_to_the_kernel(self, bed: InlineBed) -> None:
        bed.arrive(frame(), frame(PING))
        flow, ping = bed.source.read(2)
        bed.source.answer([(flow, Verdict(Action.REPEAT, mark=1, means=Action.DROP)), (ping, ACCEPT)])
        ((key, value),) = bed.remembered.items()
        assert (int.from_bytes(key[:4], "little"), int.from_bytes(value[16:20], "little")) == (INTERFACE, 0)
        assert bed.passed() == [PING]

    def test_turns_look_verdicts_up_and_count_by_interface(self, bed: InlineBed) -> None:
        known: dict[bytes, Verdict] = {}
        asked: list[Packet] = []

        def decide(packet: Packet, key: bytes | None) -> Verdict:
            asked.append(packet)
            assert key is not None
            return known.setdefault(key, DROP)

        assert bed.source.sort(known, decide, 9) == (0, [])
        bed.arrive(frame(), frame(), frame(out=True))
        assert bed.source.sort(known, decide, 9, each=True) == (3, [(3, 3, DROP)])
        assert len(asked) == 2
        assert bed.passed() == []
        assert bed.counts() == {"judged": 3, "dropped": 3}
        bed.arrive(frame(), frame())
        assert bed.source.skim(ACCEPT, 1) == 1
        assert bed.source.skim_each(ACCEPT, 9) == 1
        assert bed.passed() == [UDP, UDP]
        assert bed.credits == (0, 0)

    def test_the_heartbeat_shows_that_it_waits(self, bed: InlineBed) -> None:
        before = bed.live[link_maps.HEARTBEAT]
        began = time.monotonic()
        assert bed.source.wait(60) == []
        # A quarter of the time after which the kernel lets everything pass.
        assert time.monotonic() - began < 10
        assert bed.live[link_maps.HEARTBEAT] > before
        bed.supervisor.send(b"stop\n")
        assert bed.source.wait(5) == [bed.control.fileno()]

    def test_credits_of_frames_that_were_lost_come_back(self, bed: InlineBed, monkeypatch: pytest.MonkeyPatch) -> None:
        bed.live[link_maps.UP] += 3
        bed.live[link_maps.UP_BYTES] += 300
        now = time.monotonic()
        clock = SimpleNamespace(monotonic=lambda: now, monotonic_ns=lambda: int(now * 1e9), time=time.time)
        monkeypatch.setattr(inline, "time", clock)
        bed.source.wait(0)
        assert bed.credits == (3, 300)
        now += 0.1
        bed.source.wait(0)
        assert bed.credits == (3, 300)
        now += 1
        bed.source.wait(0)
        assert bed.credits == (0, 0)
        assert bed.source.drops() == 3
        bed.kernel.send(b"x")
        bed.live[link_maps.UP] += 1
        now += 1
        bed.source.wait(0)
        assert bed.credits[0] == 1

    def test_at_the_end_everything_passes_and_the_links_close(self, bed: InlineBed) -> None:
        bed.arrive(frame(), frame(PING))
        bed.source.finish()
        assert bed.passed() == [UDP, PING]
        assert bed.source.unanswered == 2
        assert bed.live[link_maps.HEARTBEAT] == 0
        for descriptor in bed.links:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(descriptor)
        bed.source.gone(str(INTERFACE))

    def test_a_verdict_of_a_queue_is_refused(self, bed: InlineBed) -> None:
        packet = Packet(UDP, id=3)
        bed.source.check(packet, DROP)
        with pytest.raises(VerdictError, match="packet 3: there is no other queue for a packet of an interface"):
            bed.source.check(packet, Verdict(Action.QUEUE, queue=7))
        with pytest.raises(RewriteError, match="packet 3 is a frame that waits for its verdict; it cannot be rewritten"):
            bed.source.check(packet, Verdict(Action.ACCEPT, payload=UDP))
