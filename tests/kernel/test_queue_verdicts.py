"""The verdicts of a program on real packets: in any order, from any thread, with marks, rewritten, and none forgotten."""

from __future__ import annotations

import socket
import threading

import pytest
from namespace import Namespace
from queue_program import RANGES, serving
from queued import NUMBER, PORT, Wire, queue_rule, until

from nfq_agent import (
    ACCEPT,
    RETAIN,
    Action,
    Packet,
    Queue,
    Verdict,
)
from nfq_agent.checksum import mend
from nfq_agent.queue.settings import BoundFamily

pytestmark = pytest.mark.kernel


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
def test_a_queue_of_any_family_gets_what_the_rules_send(netns: Namespace, family: BoundFamily) -> None:
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
                thread.join(60)
                assert not thread.is_alive()
                got = wire.arrived(1980)
            assert sorted(map(int, got)) == [number for number in range(2000) if number % 100]
            assert wire.nothing_more()

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
