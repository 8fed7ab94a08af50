"""UDP flows that are read and answered without an element: they say what the parsers and the elements say."""

from __future__ import annotations

import random

import pytest
from flow_judges import POLICIES, judge
from hypothesis import example, given
from hypothesis import strategies as st
from openings import DATAGRAMS as OPENINGS
from openings import dns_query
from raw_packets import with_more

from nfq_agent.checksum import is_wrong
from nfq_agent.context import Context
from nfq_agent.decisions import Decisions
from nfq_agent.elements import packet_element
from nfq_agent.flow import Exchange
from nfq_agent.flow_table import FlowTable
from nfq_agent.message_events import PACKETS, SECONDS
from nfq_agent.openings import is_silent, name_in_message
from nfq_agent.packet import Packet
from nfq_agent.protocols import NO, Found, dns, quic
from nfq_agent.protocols.known import DATAGRAMS
from nfq_agent.service.packet_judge import PacketJudge
from nfq_agent.testing import udp
from nfq_agent.verdict import ACCEPT, DROP

KNOWN = {name: data for name, (data, _) in OPENINGS.items()}
CLIENT, RESOLVER, SERVER = "192.0.2.1:40000", "198.51.100.1:53", "198.51.100.1:4000"
QUERY = dns_query("www.good.test")
ANSWER = dns_query("www.good.test", flags=0x8180)
JUNK = bytes(60)
WIRES = st.sampled_from([
    b"\3www\4good\4test\0", b"\3WWW\4Good\4test\0", b"\0", b"\1a\0", b"\2a.\0", b"\2a b\0", b"\3a-_\0", b"\xc0\x0c",
    b"\1a\xc0\x0c", b"\x40a\0", b"\x3f" + b"a" * 63 + b"\0", (b"\x3f" + b"a" * 63) * 3 + b"\x3d" + b"a" * 61 + b"\0",
    (b"\x3f" + b"a" * 63) * 4 + b"\0", b"\1a", b"\1\xe9\0",
])  # fmt: skip


@given(
    st.sampled_from([0, 1, 2, 0xFF]), st.integers(0, 0xFFFF), WIRES, st.binary(max_size=12),
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=2), st.integers(0, 20),
)  # fmt: skip
@example(1, 0x100, b"\1a\0", b"\0\1\0\1", [], 0)
@example(1, 0x100, b"\1a\0", b"\0\1\0", [], 0)
@example(1, 0x4100, b"\1a\0", b"\0\1\0\1", [], 0)
def test_a_message_says_what_the_parser_says(
    questions: int, flags: int, wire: bytes, behind: bytes, changes: list[tuple[int, int]], cut: int
) -> None:
    data = bytearray(QUERY[:2] + flags.to_bytes(2, "big") + questions.to_bytes(2, "big") + bytes(6) + wire + behind)
    for at, value in changes:
        data[at % len(data)] = value
    message = bytes(data[: len(data) - cut])
    name = name_in_message(message)
    found = dns.datagram(message, known=True)
    if name is not None:
        assert isinstance(found, Found)
        assert found.facts["dns_name"] == (name,)
        assert "conflict" not in found.facts


def test_what_programs_ask_and_are_answered_is_plain() -> None:
    assert name_in_message(QUERY) == name_in_message(ANSWER) == "www.good.test"
    assert name_in_message(dns_query("WWW.Good.Test", 28)) == "www.good.test"
    # With EDNS and a cookie; and cut anywhere.
    assert name_in_message(QUERY[:11] + b"\1" + QUERY[12:] + b"\0\0\x29\x04\xd0\0\0\0\0\0\0") == "www.good.test"
    assert not any(name_in_message(QUERY[:at]) for at in range(len(QUERY)))
    assert name_in_message(b"") is None
    assert name_in_message(dns_query("")) is None


def says(data: bytes) -> bool:
    """Whether a first datagram on no port of DNS may be of a protocol."""
    parsers = (dns.datagram, *DATAGRAMS)
    return any(parser(data) is not NO for parser in parsers) or quic.long_header(data) is not None


@given(
    st.sampled_from(sorted(KNOWN)), st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 255)), max_size=3), st.integers(0, 3),
    st.binary(max_size=3),
)  # fmt: skip
def test_what_is_silent_is_of_no_protocol(name: str, changes: list[tuple[int, int]], cut: int, behind: bytes) -> None:
    data = bytearray(KNOWN[name])
    for at, value in changes:
        data[at % len(data)] = value
    message = bytes(data[: len(data) - cut]) + behind
    assert not (is_silent(message) and says(message))


def test_there_is_an_example_of_each_protocol_of_datagrams() -> None:
    found = {parser.__module__ for parser in DATAGRAMS for data in KNOWN.values() if parser(data) is not NO}
    assert found == {parser.__module__ for parser in DATAGRAMS}
    assert not any(is_silent(data) for data in KNOWN.values())
    assert is_silent(JUNK)
    assert not is_silent(b"")


def both(policies: list[str]) -> tuple[PacketJudge, PacketJudge, FlowTable, list[Decisions]]:
    """A judge that is shown every packet, and one with its table; and what each has decided."""
    cls = packet_element("policy")
    rules = [("policy", rule) for name in policies for rule in cls.rules_of(cls.Options.from_table(POLICIES[name]))]
    decisions = [Decisions(rules) for _ in range(2)]
    judges = [judge(policies, context=Context(decisions=each)) for each in decisions]
    table = judges[1].settle_flows()
    assert isinstance(table, FlowTable)
    return judges[0], judges[1], table, decisions


def talk(source: random.Random) -> list[tuple[float, Packet]]:
    """Datagrams of a few flows, in which each may say anything."""
    made = []
    now = 1000.0
    names = ["www.good.test", "a.good.test", "bad.test", "x.bad.test", "other.test"]
    ends = [(f"192.0.2.{number}:{4000 + number}", source.choice((RESOLVER, SERVER, SERVER))) for number in range(3)]
    for number in range(source.choice((20, 200))):
        client, server = source.choice(ends)
        kind = source.random()
        if server == RESOLVER and kind < 0.9:
            data = dns_query(source.choice(names), source.choice((1, 28)), source.randrange(1 << 16))
            data = data[:2] + (b"\x81\x80" if source.random() < 0.4 else b"\1\0") + data[4:]
        elif kind < 0.97:
            data = source.choice((JUNK, JUNK[:9], b"x" * 1300, b"\xff" * 40, source.randbytes(source.randrange(1, 90))))
        else:
            data = source.choice((*KNOWN.values(), QUERY, b""))
        if source.random() < 0.3:
            client, server = server, client
        packet = udp(client, server, data)
        bytes_ = bytearray(packet.payload)
        if source.random() < 0.01:
            bytes_[-1] ^= 1
        now += source.choice((0.0, 0.001, 0.1)) if source.random() < 0.99 else source.choice((3.0, 11.0))
        made.append((now, Packet(bytes(bytes_), id=number, time=now, checksum_ready=source.random() < 0.5)))
    return made


@pytest.mark.parametrize("policies", [[name] for name in POLICIES] + [["left-open", "allow-list"]], ids="-".join)
def test_no_verdict_and_no_decision_differs(policies: list[str]) -> None:
    unshown = 0
    for seed in range(40):
        whole, quick, table, decisions = both(policies)
        for now, packet in talk(random.Random(seed)):
            whole.now = quick.now = now
            wanted = whole.verdict(packet)
            got = table.look_up(packet.payload, packet.length, now, packet.checksum_ready)
            unshown += got is not None
            got = got or quick.verdict(packet)
            assert (got.action, got.rejects) == (wanted.action, wanted.rejects), (seed, packet.id)
        assert bytes(decisions[0].room) == bytes(decisions[1].room), seed
    # A policy on the method of HTTP, or one that lets nothing pass at first, is shown what it was.
    assert unshown or policies == ["mixed"]


def test_a_question_and_its_answer_are_never_shown() -> None:
    _, quick, table, _ = both(["allow-list"])
    for packet in (
        udp(CLIENT, RESOLVER, QUERY),
        udp(RESOLVER, CLIENT, ANSWER),
        udp(CLIENT, RESOLVER, dns_query("b.good.test", 28)),
    ):
        assert table.look_up(packet.payload, packet.length, 1.0) is ACCEPT
    assert len(table) == 1
    (flow,) = quick.openings(5)
    assert flow.opening == Exchange("dns", "b.good.test", 0, 0, 0.0, gave_up=False)
    # From now on its packets are shown.
    packet = udp(CLIENT, RESOLVER, QUERY)
    assert table.look_up(packet.payload, packet.length, 1.0) is None


@pytest.mark.parametrize(
    "data",
    [dns_query("www.bad.test"), b"\0" * 20, QUERY[:20], dns_query("a b.good.test"), b""],
    ids=["denied", "junk", "cut", "odd", "empty"],
)
def test_what_is_not_an_accepted_question_is_shown(data: bytes) -> None:
    _, _, table, _ = both(["allow-list"])
    for first in (b"", QUERY):
        if first:
            packet = udp(CLIENT, RESOLVER, first)
            assert table.look_up(packet.payload, packet.length, 1.0) is ACCEPT
        packet = udp(CLIENT, RESOLVER, data)
        assert table.look_up(packet.payload, packet.length, 1.0) is None


def test_joined_datagrams_are_shown() -> None:
    _, _, table, _ = both(["allow-list"])
    for server, data in ((RESOLVER, QUERY), (SERVER, JUNK)):
        packet = udp(CLIENT, server, data)
        assert table.look_up(packet.payload, packet.length, 1.0, ready=False, joined=True) is None
        assert table.look_up(packet.payload, packet.length, 1.0, ready=False) is ACCEPT
        assert table.look_up(packet.payload, packet.length, 1.0, ready=False, joined=True) is None


def quiet(table: FlowTable, count: int, now: float = 1.0) -> list[bool]:
    """Whether each of so many datagrams that say nothing is answered without an element."""
    packet = udp(CLIENT, SERVER, JUNK)
    return [table.look_up(packet.payload, packet.length, now) is ACCEPT for _ in range(count)]


def test_a_flow_that_says_nothing_is_shown_where_the_answer_turns() -> None:
    # By default the packets of an allow list pass as long as they may say something.
    _, _, table, _ = both(["allow-list"])
    assert quiet(table, PACKETS) == [True] * (PACKETS - 1) + [False]
    _, _, table, _ = both(["allow-list"])
    assert quiet(table, 2) == [True, True]
    assert quiet(table, 1, now=1.0 + SECONDS + 0.1) == [False]
    # Of a block list no answer turns.
    _, _, table, _ = both(["block-list"])
    assert all(quiet(table, 100))


def test_a_policy_that_waits_for_less_is_shown_what_is_behind_that() -> None:
    _, _, table, _ = both(["allow-list-short"])
    assert quiet(table, 4) == [True, True, True, False]


def test_a_flow_is_taken_over_with_what_it_has_said() -> None:
    _, quick, table, _ = both(["block-list"])
    quiet(table, 5, now=7.5)
    (flow,) = quick.openings(5)
    assert flow.opening == Exchange("", "", 5, 5 * len(JUNK), 7.5, gave_up=False)
    _, quick, table, _ = both(["block-list"])
    quiet(table, PACKETS)
    (flow,) = quick.show_openings(5)
    assert flow.facts["dpi"] == "gave-up"
    assert flow.facts["dpi_reason"] == f"{PACKETS} packets with payload, and it is not known"
    assert flow.facts["reason"] == "policy: default"


def of_size(packet: Packet, size: int) -> Packet:
    """The packet with another length of its datagram, and without a checksum of that."""
    data = bytearray(packet.payload)
    at = 20 if data[0] >> 4 == 4 else 40
    data[at + 4 : at + 8] = size.to_bytes(2, "big") + b"\0\0"
    return Packet(bytes(data))


@pytest.mark.parametrize("name", sorted(KNOWN))
@pytest.mark.parametrize("ends", [("192.0.2.1:4000", "198.51.100.1:4001"), ("[2001:db8::1]:4000", "[2001:db8::2]:4001")])
def test_bytes_behind_a_datagram_hide_nothing(monkeypatch: pytest.MonkeyPatch, name: str, ends: tuple[str, str]) -> None:
    """Its receiver cuts them off: with them it is no message of the protocol, and without them it is."""
    rule = {"action": "drop", "protocol": ["wireguard", "stun", "ntp", "openvpn", "bittorrent", "dns"]}
    monkeypatch.setitem(POLICIES, "none", {"default": "accept", "rule": [rule]})
    whole, quick, table, _ = both(["none"])
    for behind in (b"", b"x", b"\xff" * 70):
        packet = Packet(with_more(udp(*ends, KNOWN[name]).payload, behind))
        assert packet.data == KNOWN[name]
        assert not is_wrong(packet)
        assert table.look_up(packet.payload, packet.length, 1.0) in (None, DROP)
        assert whole.verdict(packet) is quick.verdict(packet) is DROP


def test_a_datagram_that_its_packet_has_no_room_for_is_discarded() -> None:
    for size in (0, 7, 9 + len(QUERY)):
        packet = of_size(udp(CLIENT, RESOLVER, QUERY), size)
        assert is_wrong(packet)
        _, quick, table, _ = both(["allow-list"])
        assert table.look_up(packet.payload, packet.length, 1.0) is None
        assert quick.verdict(packet) is DROP
    # In IPv6 a length of 0 is that of a jumbogram, whose length no field of UDP has.
    packet = of_size(udp("[2001:db8::1]:4000", "[2001:db8::2]:53", QUERY), 0)
    assert packet.data == QUERY
