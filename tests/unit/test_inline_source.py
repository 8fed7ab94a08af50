"""An inline link as a source of packets, on frames in memory: verdicts, counts, credits, and flows left to the kernel."""

from __future__ import annotations

import mmap
import os
import socket
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fake_frames import ETHERNET, TO_CONTAINER, FakeFrames, Frame
from frames_contract import ARP, PING, UDP

from nfq_agent.capture import inline, link_maps
from nfq_agent.capture.following import Table
from nfq_agent.capture.inline import InlineSource
from nfq_agent.flow import Watch
from nfq_agent.flow_table import FlowTable
from nfq_agent.host import packet_socket
from nfq_agent.packet import Hook, Packet
from nfq_agent.verdict import ACCEPT, DROP, RETAIN, WOULD_DROP, Action, RewriteError, Verdict, VerdictError

INTERFACE = 5


class FlowJudge:
    """Asked about packets: accepts and settles UDP, drops others, or gives the verdict that `of` has for the payload."""

    def __init__(self) -> None:
        self.of: dict[bytes, Verdict] = {}
        self.asked: list[Packet] = []

    def over(self, table: FlowTable) -> Callable[[Packet], Verdict]:
        def ask(packet: Packet) -> Verdict:
            self.asked.append(packet)
            verdict = self.of.get(packet.payload, ACCEPT if packet.payload == UDP else DROP)
            if packet.payload == UDP:
                table.settle(Watch.NOTHING, table.observe(packet.headers.five_tuple, 1.0, packet.length), verdict)
            return verdict

        return ask


class InlineBed:
    """An inline link with one interface, and the memory that its programs share with it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.frames = FakeFrames()
        monkeypatch.setattr(inline, "Frames", lambda *_: self.frames)
        self._memory = os.memfd_create("live")
        os.ftruncate(self._memory, mmap.PAGESIZE)
        self.remembered: dict[bytes, bytes] = {}
        live: Any = SimpleNamespace(descriptor=self._memory)
        flows: Any = SimpleNamespace(put_all=self.remembered.update)
        self.table = Table(("judged", "dropped", "would_drop"), 4)
        self._socket, self.kernel = socket.socketpair()
        self.control, self.supervisor = socket.socketpair()
        self.source = InlineSource(self._socket, live, flows, 0.4, self.table)
        self.source.start(self.control.fileno())
        self.links = os.pipe()
        self.source.add(*self.links, str(INTERFACE), "1")
        mapped = mmap.mmap(self._memory, mmap.PAGESIZE)
        self.live = memoryview(mapped).cast("Q")
        self.frames.on_crossing = self.come_back

    def arrive(self, *frames: Frame) -> None:
        self.frames.waiting.extend(frames)
        self.live[link_maps.UP] += len(frames)
        self.live[link_maps.UP_BYTES] += sum(len(frame.data) for frame in frames)

    def come_back(self) -> None:
        """The program on the pair has seen a frame that was sent over it."""
        self.live[link_maps.BACK] += 1

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


class Late:
    """The clock of the source. What comes late comes while the source sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self._due: list[tuple[float, Callable[[], object]]] = []
        clock = SimpleNamespace(
            monotonic=lambda: self.now, monotonic_ns=lambda: int(self.now * 1e9), sleep=self._sleep, time=time.time
        )
        monkeypatch.setattr(inline, "time", clock)

    def after(self, seconds: float, act: Callable[[], object]) -> None:
        """Do it so many seconds from now."""
        self._due.append((self.now + seconds, act))

    def _sleep(self, seconds: float) -> None:
        self.now += seconds
        due, self._due = [each for each in self._due if each[0] <= self.now], [each for each in self._due if each[0] > self.now]
        for _, act in due:
            act()


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

    def test_turns_by_flows_ask_about_the_first_packet_of_a_flow(self, bed: InlineBed) -> None:
        table, judge = FlowTable(), FlowJudge()
        ask = judge.over(table)
        assert bed.source.judge(table, ask, 1.0, 9) == (0, [], None)
        bed.arrive(frame(), frame(), Frame(ARP, mark=INTERFACE), frame(PING), frame(out=True))
        assert bed.source.judge(table, ask, 1.0, 9, each=True) == (4, [(5, 2, ACCEPT), (5, 1, DROP), (5, 1, ACCEPT)], None)
        assert [packet.payload for packet in judge.asked] == [UDP, PING]
        assert bed.passed() == [UDP, UDP, ARP[14:], UDP]
        assert bed.counts() == {"judged": 4, "dropped": 1}
        assert bed.credits == (0, 0)

    def test_a_verdict_that_is_more_than_an_answer_ends_the_turn_and_no_frame_is_lost(self, bed: InlineBed) -> None:
        table, judge = FlowTable(), FlowJudge()
        ask = judge.over(table)
        reject = Verdict(Action.DROP, inject=(PING,))
        judge.of[PING] = reject
        bed.arrive(frame(), frame(PING), frame(), frame(PING))
        count, runs, left = bed.source.judge(table, ask, 1.0, 9)
        assert (count, runs) == (2, [(4, 1, ACCEPT)])
        assert left is not None
        assert left[1] is reject
        # The rest of the frames still waits, and so do the credits.
        assert bed.credits[0] == 4
        assert bed.passed() == [UDP]
        bed.source.answer([left])
        assert bed.passed() == [PING]
        count, runs, left = bed.source.judge(table, ask, 1.0, 9, each=True)
        assert (count, runs) == (2, [(4, 1, ACCEPT)])
        assert left is not None
        bed.source.answer([(left[0], RETAIN)])
        assert bed.credits == (0, 0)
        assert bed.passed() == [UDP]
        bed.source.verdict(left[0], ACCEPT)
        assert bed.passed() == [PING]
        assert bed.counts() == {"judged": 4, "dropped": 1}

    @pytest.mark.parametrize("how", ["read", "finish"])
    def test_the_rest_of_a_turn_is_read_or_let_pass(self, bed: InlineBed, how: str) -> None:
        """As when a watcher of flows comes, or a stop."""
        table, judge = FlowTable(), FlowJudge()
        judge.of[PING] = Verdict(Action.ACCEPT, delay=1.0)
        bed.arrive(frame(), frame(PING), frame(), frame(out=True))
        *_, left = bed.source.judge(table, judge.over(table), 1.0, 9)
        assert left is not None
        bed.source.answer([(left[0], RETAIN)])
        assert bed.passed() == [UDP]
        if how == "read":
            rest = bed.source.read(9)
            assert [packet.id for packet in rest] == [3, 4]
            bed.source.answer([(packet, ACCEPT) for packet in rest])
            assert bed.passed() == [UDP, UDP]
            assert bed.credits == (0, 0)
        bed.source.finish()
        assert bed.passed() == ([PING] if how == "read" else [PING, UDP, UDP])
        assert bed.source.unanswered == (1 if how == "read" else 3)
        assert bed.credits == (0, 0)

    def test_a_turn_by_flows_leaves_flows_to_the_kernel_before_it_sends(self, bed: InlineBed) -> None:
        table, judge = FlowTable(), FlowJudge()
        judge.of[UDP] = Verdict(Action.REPEAT, mark=1, means=Action.ACCEPT)
        judge.of[PING] = Verdict(Action.REPEAT, mark=2, means=Action.DROP)
        bed.frames.before_send = lambda: bed.frames.sent.append((bytes(24) + b"%d kept" % len(bed.remembered), 0))
        bed.arrive(frame(), frame(PING), frame())
        count, runs, left = bed.source.judge(table, judge.over(table), 1.0, 9)
        assert (count, len(runs), left) == (3, 3, None)
        assert bed.passed() == [b"2 kept", UDP, UDP]
        found = {
            int.from_bytes(key[8:12], "little"): int.from_bytes(value[16:20], "little") for key, value in bed.remembered.items()
        }
        assert found == {17: 1, 1: 0}

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

    def test_at_the_end_it_waits_for_frames_whose_softirq_waits(self, bed: InlineBed, monkeypatch: pytest.MonkeyPatch) -> None:
        late = Late(monkeypatch)
        bed.live[link_maps.UP] += 2
        late.after(0.5, lambda: bed.frames.waiting.extend([frame(), frame(PING)]))
        bed.frames.on_crossing = lambda: late.after(0.4, bed.come_back)
        bed.source.finish()
        assert bed.passed() == [UDP, PING]
        assert bed.credits[0] == 0
        assert bed.live[link_maps.BACK] == 2
        # As long as it has to, and no longer.
        assert 0.9 <= late.now < 1

    def test_at_the_end_it_waits_a_second_at_most_for_what_was_lost(
        self, bed: InlineBed, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        late = Late(monkeypatch)
        bed.live[link_maps.UP] += 1
        bed.source.finish()
        assert 1 <= late.now < 1.1

    def test_at_the_end_it_does_not_wait_for_what_found_no_room(self, bed: InlineBed, monkeypatch: pytest.MonkeyPatch) -> None:
        late = Late(monkeypatch)
        bed.live[link_maps.UP] += 3
        told = [1, 2]
        monkeypatch.setattr(packet_socket, "lost", lambda _: told.pop() if told else 0)
        bed.source.finish()
        assert late.now < 0.1

    def test_what_was_lost_on_the_way_back_is_not_waited_for_once_it_was_quiet(
        self, bed: InlineBed, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        late = Late(monkeypatch)
        bed.frames.on_crossing = lambda: None
        bed.arrive(frame())
        assert bed.source.skim(ACCEPT, 9) == 1
        bed.source.wait(0)
        late.now += 1
        bed.source.wait(0)
        assert bed.source.drops() == 0
        begun = late.now
        bed.source.finish()
        assert late.now - begun < 0.1

    def test_a_verdict_of_a_queue_is_refused(self, bed: InlineBed) -> None:
        packet = Packet(UDP, id=3)
        bed.source.check(packet, DROP)
        with pytest.raises(VerdictError, match="packet 3: there is no other queue for a packet of an interface"):
            bed.source.check(packet, Verdict(Action.QUEUE, queue=7))
        with pytest.raises(RewriteError, match="packet 3 is a frame that waits for its verdict; it cannot be rewritten"):
            bed.source.check(packet, Verdict(Action.ACCEPT, payload=UDP))
