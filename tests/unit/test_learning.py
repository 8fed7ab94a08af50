"""Which DNS answers put names into the table: packets in, names out."""

from __future__ import annotations

import struct

import pytest
from openings import dns_query, over_tcp

from nfq_agent.flow import Flow
from nfq_agent.learning import NameLearner
from nfq_agent.names import SIZE, NameTable
from nfq_agent.packet import Packet
from nfq_agent.testing import tcp, udp

HOST, RESOLVER, OTHER = "192.0.2.1:40000", "192.0.2.53:53", "192.0.2.54:53"
ADDRESS = bytes((10, 0, 0, 1))


class Learning:
    """A learner with one flow from the host to a resolver."""

    def __init__(self, resolver: str = RESOLVER) -> None:
        self.names = NameTable(memoryview(bytearray(SIZE)), b"x" * 16, 1, ["*.good.test"], [bytes((192, 0, 2, 53))])
        self.learner = NameLearner(self.names)
        self.resolver = resolver
        self.flow = Flow(udp(HOST, resolver).headers.five_tuple, 0.0, 0.0)
        self.sequence = {HOST: 1000, resolver: 2000}

    def see(self, packet: Packet) -> None:
        self.learner.see(packet, self.flow, packet.headers)

    def ask(self, name: str = "a.good.test", **options: int) -> None:
        self.see(udp(HOST, self.resolver, dns_query(name, **options)))

    def answer(self, message: bytes) -> None:
        self.see(udp(self.resolver, HOST, message))

    def segment(self, src: str, data: bytes = b"", flags: str = "PA") -> None:
        """The next segment of one side of a connection."""
        dst = HOST if src != HOST else self.resolver
        self.see(tcp(src, dst, data, flags=flags, seq=self.sequence[src]))
        self.sequence[src] += len(data) + ("S" in flags)

    @property
    def known(self) -> tuple[str, ...]:
        return self.names.names(ADDRESS, 1.0)


def reply(name: str = "a.good.test", number: int = 7, *, asked: str = "", kind: int = 1) -> bytes:
    """An answer with one address. asked: the name in its question, if another."""
    query = dns_query(asked or name, kind, number)
    labels = b"".join(bytes((len(each),)) + each.encode() for each in name.split(".")) + b"\0"
    record = labels + struct.pack("!HHIH", 1, 1, 600, len(ADDRESS)) + ADDRESS
    return query[:2] + struct.pack("!5H", 0x8180, 1, 1, 0, 0) + query[12:] + record


def test_an_answer_to_a_question_is_learned() -> None:
    learning = Learning()
    learning.ask()
    assert not learning.known
    assert learning.learner.follows(learning.flow)
    learning.answer(reply())
    assert learning.known == ("a.good.test",)


def test_an_answer_counts_once_for_each_question() -> None:
    learning = Learning()
    learning.answer(reply())
    assert learning.known == ()
    learning.ask()
    learning.answer(reply("b.good.test", asked="a.good.test"))
    learning.answer(reply())
    assert learning.known == ()


@pytest.mark.parametrize(
    "wrong", [reply(number=8), reply(asked="b.good.test"), reply(kind=28), dns_query("a.good.test"), b"junk"]
)
def test_an_answer_to_another_question_is_not_learned(wrong: bytes) -> None:
    learning = Learning()
    learning.ask()
    learning.answer(wrong)
    assert not learning.known
    # The question still waits for its own.
    learning.answer(reply())
    assert learning.known == ("a.good.test",)


def test_a_resolver_that_is_not_believed_is_not_followed() -> None:
    learning = Learning(OTHER)
    learning.ask()
    learning.answer(reply())
    assert learning.known == ()
    assert not learning.learner.follows(learning.flow)


def test_a_name_that_no_rule_asks_for_is_not_learned() -> None:
    learning = Learning()
    learning.ask("a.bad.test")
    learning.answer(reply("a.bad.test"))
    assert learning.known == ()


@pytest.mark.parametrize(("others", "learned"), [(63, True), (64, False)])
def test_the_questions_that_wait_are_bounded_and_the_oldest_is_forgotten(others: int, learned: bool) -> None:
    learning = Learning()
    learning.ask()
    for number in range(others):
        learning.ask(number=100 + number)
    learning.answer(reply())
    assert bool(learning.known) == learned


def connected() -> Learning:
    learning = Learning()
    learning.segment(HOST, flags="S")
    learning.segment(RESOLVER, flags="SA")
    return learning


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_messages_over_tcp_in_segments_of_any_size(size: int) -> None:
    learning = connected()
    for src, message in ((HOST, dns_query("a.good.test")), (RESOLVER, reply())):
        data = over_tcp(message)
        for at in range(0, len(data), size):
            learning.segment(src, data[at : at + size])
    assert learning.known == ("a.good.test",)


def test_two_messages_in_one_segment() -> None:
    learning = connected()
    learning.segment(HOST, over_tcp(dns_query("b.good.test", number=6)) + over_tcp(dns_query("a.good.test")))
    learning.segment(RESOLVER, over_tcp(reply()) + over_tcp(reply("b.good.test", 6)))
    assert set(learning.known) == {"a.good.test", "b.good.test"}


def test_a_connection_whose_beginning_was_not_seen_teaches_nothing() -> None:
    learning = Learning()
    learning.segment(HOST, over_tcp(dns_query("a.good.test")))
    learning.segment(RESOLVER, over_tcp(reply()))
    assert learning.known == ()


@pytest.mark.parametrize("together", [False, True])
def test_segments_that_differ_end_the_reading_of_a_connection(together: bool) -> None:
    learning = connected()
    learning.segment(HOST, over_tcp(dns_query("a.good.test")))
    data = over_tcp(reply())
    # The second part first; then another one in the same place, alone or with the first part.
    learning.see(tcp(RESOLVER, HOST, data[20:], seq=2001 + 20))
    if together:
        learning.see(tcp(RESOLVER, HOST, data[:20] + bytes(len(data) - 20), seq=2001))
    else:
        learning.see(tcp(RESOLVER, HOST, bytes(len(data) - 20), seq=2001 + 20))
        learning.see(tcp(RESOLVER, HOST, data[:20], seq=2001))
    learning.see(tcp(RESOLVER, HOST, data, seq=2001))
    learning.see(tcp(RESOLVER, HOST, data, seq=2001 + len(data)))
    assert learning.known == ()
