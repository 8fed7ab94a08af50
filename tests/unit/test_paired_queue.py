"""Two queues that are served as one, on a fake kernel: what is in either is answered there, and counted."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator

import pytest
from fake_queue import FakeKernel

from nfq_agent import ACCEPT, DROP, RETAIN, Verdict
from nfq_agent.counters import Counters
from nfq_agent.log import Log
from nfq_agent.packet import Packet
from nfq_agent.queue.paired import PairedQueue
from nfq_agent.queue.settings import QueueSettings
from nfq_agent.service.order import Order, order_in
from nfq_agent.service.served_queue import ServedQueue
from nfq_agent.service.store import Store
from nfq_agent.testing import udp

NEW, KNOWN = 7, 8
WANTED = QueueSettings("packet", 65535, 4, fail_open=False, gso=False, uid_gid=False)


class Pair:
    """Both queues, bound on a fake kernel."""

    def __init__(self, kernel: FakeKernel) -> None:
        self.kernel = kernel
        self.counters = Counters()
        log = Log(lambda _: True, "error", float)
        self.served = [ServedQueue(number, WANTED, ACCEPT, log) for number in (NEW, KNOWN)]
        for each in self.served:
            each.open()
        new, known = (each.queue for each in self.served)
        assert new is not None
        assert known is not None
        self.queue = PairedQueue(new, known, self.counters)

    def send(self, number: int, *data: bytes) -> None:
        for each in data:
            self.kernel.send(udp("127.0.0.1:40000", "127.0.0.1:9999", each).payload, number)

    def passed(self, count: int) -> list[bytes]:
        self.kernel.settled()
        return [Packet(payload).data for payload in self.kernel.take(count)]


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    kernel = FakeKernel()
    kernel.install(monkeypatch)
    made = Pair(kernel)
    yield made
    for each in made.served:
        each.close()
    kernel.close()


def test_a_turn_answers_both_known_flows_first(pair: Pair) -> None:
    pair.send(NEW, b"n1", b"n2")
    pair.send(KNOWN, b"k1")
    assert pair.queue.skim_each(ACCEPT) == 3
    assert pair.passed(3) == [b"k1", b"n1", b"n2"]
    assert (pair.counters.known_received, pair.counters.known_last_id, pair.queue.last) == (1, 1, 2)
    assert pair.queue.skim(ACCEPT) == 0


def test_a_full_queue_leaves_the_other_free(pair: Pair) -> None:
    pair.send(NEW, *(b"n" for _ in range(9)))
    pair.send(KNOWN, b"k1")
    assert [packet.data for packet in pair.queue.read()] == [b"k1", *[b"n"] * 4]


def test_each_packet_is_answered_in_its_own_queue(pair: Pair) -> None:
    pair.send(NEW, b"n1")
    pair.send(KNOWN, b"k1", b"k2")
    packets = pair.queue.read()
    assert [packet.id for packet in packets] == [1, 2, 1]
    for packet in packets:
        pair.queue.check(packet, RETAIN)
    pair.queue.answer([(packets[0], DROP), (packets[1], RETAIN), (packets[2], RETAIN)])
    assert pair.queue.must_answer_each
    pair.queue.verdict(packets[2], ACCEPT)
    assert pair.passed(1) == [b"n1"]
    pair.queue.finish()
    assert pair.passed(1) == [b"k2"]
    assert pair.queue.unanswered == 1
    assert not pair.queue.must_answer_each


def test_known_five_tuples_are_known_in_both(pair: Pair) -> None:
    pair.send(NEW, b"n1", b"n2")
    pair.send(KNOWN, b"k1")
    known: dict[bytes, Verdict] = {}

    def decide(_packet: Packet, key: bytes | None) -> Verdict:
        if key is not None:
            known[key] = ACCEPT
        return ACCEPT

    count, runs = pair.queue.sort(known, decide)
    assert (count, [number for _, number, _ in runs], len(known)) == (3, [1, 2], 1)
    assert pair.passed(3) == [b"k1", b"n1", b"n2"]


def test_a_wait_ends_with_a_packet_of_either(pair: Pair) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        pair.queue.kernel.start(ours.fileno())
        pair.queue.be_patient(1.0)
        assert pair.queue.wait(0.0) == []
        for number in (KNOWN, NEW):
            pair.send(number, b"x")
            assert pair.queue.wait(60.0)
            assert pair.queue.skim(ACCEPT) == 1
            pair.kernel.settled()
        theirs.send(b"stop")
        assert pair.queue.wait(60.0) == [ours.fileno()]
        assert select.select([ours], [], [], 0)[0]


def test_a_queue_is_handed_on_with_its_settings(pair: Pair) -> None:
    (_, known) = pair.served
    assert known.fits
    assert known.queue is not None
    heir = ServedQueue(KNOWN, WANTED, ACCEPT, Log(lambda _: True, "error", float))
    assert not heir.inherit(Store(), "known", known.noted)
    noted = known.noted
    queue = known.give_away()
    assert queue is not None
    assert heir.inherit(Store({f"known-{KNOWN}": os.dup(queue.fileno())}), "known", noted)
    assert heir.fits
    assert heir.descriptors
    heir.close()
    known.queue = queue


def test_an_order_names_what_may_be_lost_in_both() -> None:
    for order in (Order(3, True, 9), Order(3, False), Order(None, False)):
        assert order_in(order.line) == order
