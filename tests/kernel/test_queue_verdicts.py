"""The verdicts of a program on real packets: in any order, from any thread, with marks, rewritten, and none forgotten."""

from __future__ import annotations

import socket
import threading
import time

import pytest
from namespace import Namespace
from queue_program import RANGES, serving
from queued import NUMBER, PORT, Wire, queue_rule, until

from nfq_agent import (
    ACCEPT,
    DROP,
    RETAIN,
    Action,
    Packet,
    Queue,
    Verdict,
    VerdictError,
)
from nfq_agent.checksum import mend
from nfq_agent.queue.settings import BoundFamily

pytestmark = pytest.mark.kernel


@RANGES
def test_a_callback_accepts_and_drops(netns: Namespace, copy_range: int) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()
        with (
            Queue(NUMBER, copy_range=copy_range) as queue,
            serving(queue, lambda packet: DROP if packet.data == b"two" else ACCEPT),
        ):
            wire.send(b"one", b"two", b"three")
            assert wire.arrived(2) == [b"one", b"three"]
            wire.send(b"two", b"four")
            assert wire.arrived(1) == [b"four"]

    netns.call(inside)


@RANGES
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_rewritten_bytes_arrive_if_their_checksums_are_mended(netns: Namespace, copy_range: int, family: int) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire(socket.AddressFamily(family))
        mended = True
        seen = 0

        def rewrite(packet: Packet) -> Verdict:
            nonlocal seen
            seen += 1
            start = packet.headers.data
            assert start is not None
            changed = packet.payload[:start] + b"quite another text than " + packet.data
            if mended:
                return Verdict(Action.ACCEPT, payload=mend(changed))
            # The same length, so that the checksum alone is wrong.
            return Verdict(Action.ACCEPT, payload=packet.payload[:start] + packet.data.upper())

        with Queue(NUMBER, copy_range=copy_range) as queue, serving(queue, rewrite):
            wire.send(b"this")
            assert wire.arrived(1) == [b"quite another text than this"]
            mended = False
            wire.send(b"lost by its checksum")
            mended_again = threading.Event()
            until(lambda: seen == 2 and queue.statistics().waiting == 0)
            mended = True
            mended_again.set()
            wire.send(b"that")
            assert wire.arrived(1) == [b"quite another text than that"]

    netns.call(inside)


@pytest.mark.parametrize("family", ["unspec", "inet", "inet6"])
def test_whatever_family_it_is_bound_to_it_gets_what_the_rules_send(netns: Namespace, family: BoundFamily) -> None:
    queue_rule(netns)

    def inside() -> None:
        with Queue(NUMBER, family=family) as queue:
            for wire in (Wire(), Wire(socket.AF_INET6)):
                wire.send(b"x")
                (packet,) = queue.read()
                assert packet.payload[0] >> 4 == (4 if wire.receiver.family == socket.AF_INET else 6)
                packet.accept()
                assert wire.arrived(1) == [b"x"]

    netns.call(inside)


@RANGES
def test_verdicts_in_another_order_than_the_packets(netns: Namespace, copy_range: int) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()
        kept: list[Packet] = []

        def reorder(packet: Packet) -> Verdict:
            if packet.data in (b"one", b"two"):
                kept.append(packet)
                return RETAIN
            if packet.data == b"four":
                # While older packets wait, none may be swept along by this one's verdict.
                kept[1].accept()
                kept[0].accept(payload=mend(kept[0].payload.replace(b"one", b"ONE")))
            return ACCEPT

        with Queue(NUMBER, copy_range=copy_range) as queue, serving(queue, reorder):
            wire.send(b"one", b"two", b"three", b"also", b"four")
            assert wire.arrived(5) == [b"three", b"also", b"two", b"ONE", b"four"]
            with pytest.raises(VerdictError, match="waits for no verdict"):
                kept[0].drop()

    netns.call(inside)


def test_verdicts_from_other_threads_and_a_flood_around_them(netns: Namespace) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()
        kept: list[Packet] = []

        def every_tenth(packet: Packet) -> Verdict:
            if int(packet.data) % 10 == 0:
                kept.append(packet)
                return RETAIN
            return ACCEPT

        def drop_those_by_hundred() -> None:
            done = 0
            while done < 200:
                while kept:
                    packet = kept.pop()
                    done += 1
                    if int(packet.data) % 100 == 0:
                        packet.drop()
                    else:
                        packet.accept()

        with Queue(NUMBER, max_len=10000, unanswered_after=60) as queue:
            thread = threading.Thread(target=drop_those_by_hundred)
            thread.start()
            with serving(queue, every_tenth):
                wire.send(*(b"%d" % number for number in range(2000)))
                thread.join(20)
                assert not thread.is_alive()
                got = wire.arrived(1980)
            assert sorted(map(int, got)) == [number for number in range(2000) if number % 100]
            assert wire.nothing_more()

    netns.call(inside)


@RANGES
def test_marks_and_repeated_packets(netns: Namespace, copy_range: int) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()
        marks: list[int] = []

        def count_up(packet: Packet) -> Verdict:
            marks.append(packet.mark)
            return Verdict(Action.REPEAT, mark=packet.mark + 1) if packet.mark < 5 else ACCEPT

        with Queue(NUMBER, copy_range=copy_range) as queue, serving(queue, count_up):
            wire.send(b"again and again")
            wire.arrived(1)
        assert marks == [0, 1, 2, 3, 4, 5]

    netns.call(inside)


def test_neighbours_with_the_same_mark_share_a_message(netns: Namespace) -> None:
    queue_rule(netns)
    for mark in (1, 2):
        netns.shell(f"iptables-legacy -w -t mangle -A POSTROUTING -m mark --mark {mark} -p udp --dport {PORT}")

    def inside() -> None:
        wire = Wire()
        with Queue(NUMBER) as queue:
            wire.send(*[b"x"] * 60)

            def mark(packet: Packet) -> Verdict:
                if packet.id == 60:
                    queue.stop()
                return Verdict(Action.ACCEPT, mark=1 if packet.id <= 40 else 2)

            queue.run(mark)
        wire.arrived(60)

    netns.call(inside)
    listing = netns.shell("iptables-legacy -w -t mangle -nvxL POSTROUTING").splitlines()[2:]
    assert [int(line.split()[0]) for line in listing] == [40, 20]


def test_packets_handed_on_to_another_queue_of_the_same_process(netns: Namespace) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()
        seen: list[str] = []
        with Queue(NUMBER) as first, Queue(NUMBER + 1) as second:

            def hand_on(packet: Packet) -> Verdict:
                seen.append("first")
                return Verdict(Action.QUEUE, queue=NUMBER + 1)

            def take(packet: Packet) -> Verdict:
                seen.append("second")
                return ACCEPT

            with serving(first, hand_on), serving(second, take):
                wire.send(b"by way of two")
                assert wire.arrived(1) == [b"by way of two"]
        assert seen == ["first", "second"]

    netns.call(inside)


@RANGES
def test_what_a_callback_raises_comes_out_and_no_packet_is_lost(netns: Namespace, copy_range: int) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()

        def stumble(packet: Packet) -> Verdict:
            if packet.data == b"boom":
                raise LookupError("on purpose")
            if packet.data == b"last":
                queue.stop()
            return ACCEPT

        with Queue(NUMBER, copy_range=copy_range, on_unanswered=DROP) as queue:
            wire.send(b"one", b"boom", b"two", b"last")
            with pytest.raises(LookupError, match="on purpose"):
                queue.run(stumble)
            assert wire.arrived(1) == [b"one"]
            queue.run(stumble)
            assert wire.arrived(2) == [b"two", b"last"]
            assert queue.unanswered == 1
            assert queue.statistics().waiting == 0

    netns.call(inside)


def test_a_callback_that_forgets_its_verdict_is_told(netns: Namespace) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()
        with Queue(NUMBER) as queue:
            wire.send(b"one")
            with pytest.raises(VerdictError, match="None is not a Verdict"):
                queue.run(lambda packet: None)  # type: ignore[arg-type, return-value]  # that is the mistake
            assert wire.arrived(1) == [b"one"]

    netns.call(inside)


def test_a_retained_packet_that_is_forgotten_gets_the_policy(netns: Namespace) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()
        with Queue(NUMBER, unanswered_after=0.2) as queue, serving(queue, lambda packet: RETAIN):
            began = time.monotonic()
            wire.send(b"forgotten", b"too")
            assert wire.arrived(2) == [b"forgotten", b"too"]
            assert time.monotonic() - began > 0.15
            assert queue.unanswered == 2
        with Queue(NUMBER, unanswered_after=60, retain_limit=2) as queue, serving(queue, lambda packet: RETAIN):
            wire.send(b"1", b"2", b"3", b"4")
            # The two oldest are too many.
            assert wire.arrived(2) == [b"1", b"2"]
            assert wire.nothing_more()
        assert wire.arrived(2) == [b"3", b"4"]

    netns.call(inside)


def test_retained_packets_get_a_mark_another_round_or_another_queue(netns: Namespace) -> None:
    queue_rule(netns, match="-m mark ! --mark 9")
    netns.shell(f"iptables-legacy -w -t mangle -A POSTROUTING -m mark --mark 9 -p udp --dport {PORT}")

    def inside() -> None:
        wire = Wire()
        with Queue(NUMBER, unanswered_after=60) as first, Queue(NUMBER + 1) as second:
            wire.send(b"marked", b"again", b"over there")
            kept = first.read()
            assert [packet.data for packet in kept] == [b"marked", b"again", b"over there"]
            first.answer([(packet, RETAIN) for packet in kept])
            marked, again, there = kept
            there.requeue(NUMBER + 1)
            # Through the hook once more, where the rule lets it pass by its mark.
            again.repeat(mark=9)
            assert wire.arrived(1) == [b"again"]
            marked.accept(mark=9)
            assert wire.arrived(1) == [b"marked"]
            (packet,) = second.read()
            assert packet.data == b"over there"
            packet.accept()
            assert wire.arrived(1) == [b"over there"]
            assert first.unanswered == 0

    netns.call(inside)
    listing = netns.shell("iptables-legacy -w -t mangle -nvxL POSTROUTING").splitlines()[2:]
    assert [int(line.split()[0]) for line in listing] == [2]
