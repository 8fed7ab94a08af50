"""The `dpi` element: what it makes of segments and datagrams, its limits, its memory, and later packets that say otherwise."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openings import DATAGRAMS, OPENINGS, client_hello, dns_query, made_hello, over_tcp, record, server_name

from nfq_agent.element import Needs, PacketElement
from nfq_agent.elements.dpi import Dpi, DpiOptions
from nfq_agent.flow import Flow, FlowTable
from nfq_agent.packet import Packet
from nfq_agent.protocols import quic
from nfq_agent.testing import Bench, ip_packet, tcp, udp
from nfq_agent.verdict import DROP, Action, Verdict

CLIENT, SERVER = "192.0.2.1:40000", "198.51.100.1:443"
CLIENT6, SERVER6 = "[2001:db8::1]:40000", "[2001:db8::2]:443"
HELLO = client_hello("a.server.test")


class Talk:
    """One connection in front of the element, packet by packet."""

    def __init__(self, bench: Bench | None = None, *, src: str = CLIENT, dst: str = SERVER, isn: int = 1000) -> None:
        self.bench = bench or Bench("dpi")
        self.src, self.dst, self.isn, self.peer = src, dst, isn, 77000
        self.flow: Flow | None = None

    def send(self, packet: Packet) -> None:
        assert self.bench.chain.needs == Dpi.needs
        self.bench.decide(packet)
        packet_flow = self.bench.flows._flows  # noqa: SLF001  # what is kept is what is bounded
        five_tuple = packet.headers.five_tuple
        self.flow = packet_flow.get(five_tuple) or packet_flow[five_tuple.reversed()]

    def open(self) -> Talk:
        self.send(tcp(self.src, self.dst, flags="S", seq=self.isn))
        self.send(tcp(self.dst, self.src, flags="SA", seq=self.peer, ack=self.isn + 1))
        self.send(tcp(self.src, self.dst, flags="A", seq=self.isn + 1, ack=self.peer + 1))
        return self

    def say(self, data: bytes, at: int = 0) -> Talk:
        self.send(tcp(self.src, self.dst, data, seq=self.isn + 1 + at))
        return self

    def answer(self, data: bytes, at: int = 0) -> Talk:
        self.send(tcp(self.dst, self.src, data, seq=self.peer + 1 + at))
        return self

    @property
    def facts(self) -> dict[str, Any]:
        assert self.flow is not None
        return self.flow.facts


@pytest.mark.parametrize(("src", "dst"), [(CLIENT, SERVER), (CLIENT6, SERVER6)])
@pytest.mark.parametrize("name", list(OPENINGS))
def test_openings_in_one_segment_of_each_side(name: str, src: str, dst: str) -> None:
    client, server, wanted = OPENINGS[name]
    talk = Talk(src=src, dst=dst).open()
    if server:
        talk.answer(server)
    if client:
        talk.say(client)
    assert {key: talk.facts.get(key) for key in wanted} == wanted
    assert talk.facts["dpi"] == "decided"
    assert not talk.bench.said


@pytest.mark.parametrize("name", list(DATAGRAMS))
def test_datagrams(name: str) -> None:
    data, wanted = DATAGRAMS[name]
    talk = Talk()
    talk.send(udp("192.0.2.1:5000", "198.51.100.1:5001", data))
    assert {key: talk.facts.get(key) for key in wanted} == wanted
    assert talk.facts["dpi"] == "decided"
    for changed in () if name == "dns" else (data[:-1], data[1:], b"\xff" + data[1:]):
        other = Talk()
        other.send(udp("192.0.2.1:5000", "198.51.100.1:5001", changed))
        assert other.facts == {"dpi": "undecided"}


@settings(max_examples=60)
@given(
    st.sampled_from([name for name, (client, _, _) in OPENINGS.items() if client]),
    st.lists(st.integers(1, 500), max_size=4),
    st.integers(0, 0xFFFFFFFF),
    st.randoms(use_true_random=False),
)
def test_split_reordered_repeated_and_overlapping(name: str, cuts: list[int], isn: int, random: Any) -> None:
    client, server, wanted = OPENINGS[name]
    ends = sorted({0, len(client), *(cut % len(client) for cut in cuts)})
    # Each piece begins a little before its place, so that it overlaps the one before.
    pieces = [(max(0, at - random.randrange(4)), end) for at, end in pairwise(ends)]
    pieces += pieces[:1]
    random.shuffle(pieces)
    talk = Talk(isn=isn)
    talk.open()
    if server:
        talk.answer(server)
    for at, end in pieces:
        talk.say(client[at:end], at)
    assert {key: talk.facts.get(key) for key in wanted} == wanted
    assert talk.facts["dpi"] == "decided"


def test_a_flow_is_undecided_until_the_last_byte() -> None:
    talk = Talk().open()
    assert talk.facts["dpi"] == "undecided"
    talk.say(HELLO[:300])
    assert talk.facts == {"dpi": "undecided", "protocol": "tls"}
    assert talk.flow is not None
    assert talk.flow.undecided
    talk.say(HELLO[300:-1], 300)
    assert talk.facts["dpi"] == "undecided"
    talk.say(HELLO[-1:], len(HELLO) - 1)
    assert talk.facts["tls_sni"] == "a.server.test"
    assert not talk.flow.undecided


def test_nothing_is_kept_of_a_decided_flow_but_its_first_number() -> None:
    talk = Talk().open().say(HELLO[:300]).say(HELLO[300:], 300)
    element = talk.bench.element
    assert isinstance(element, Dpi)
    assert not element._open  # noqa: SLF001  # what is kept is what is bounded
    assert talk.flow is not None
    assert talk.flow.state[element].held == 0


def test_a_connection_that_began_before_is_given_up() -> None:
    talk = Talk().say(HELLO)
    assert talk.facts == {"dpi": "gave-up", "dpi_reason": "it began before the first packet seen"}


def test_one_direction_is_enough() -> None:
    talk = Talk()
    talk.send(tcp(talk.src, talk.dst, flags="S", seq=talk.isn))
    talk.say(HELLO)
    assert talk.facts["tls_sni"] == "a.server.test"


def test_the_answer_to_the_syn_is_as_good_as_the_syn() -> None:
    talk = Talk()
    talk.send(tcp(talk.dst, talk.src, flags="SA", seq=talk.peer, ack=talk.isn + 1))
    talk.say(HELLO)
    assert talk.facts["tls_sni"] == "a.server.test"


def test_fast_open_carries_the_hello_in_the_syn() -> None:
    talk = Talk()
    talk.send(tcp(talk.src, talk.dst, HELLO, flags="S", seq=talk.isn))
    assert talk.facts["tls_sni"] == "a.server.test"


def test_an_offloaded_packet_of_64_kilobytes() -> None:
    talk = Talk().open().say(b"POST /up HTTP/1.1\r\nHost: big.test\r\nContent-Length: 60000\r\n\r\n" + b"x" * 60000)
    assert talk.facts["http_host"] == "big.test"


def test_thirty_two_packets_and_no_more() -> None:
    talk = Talk().open()
    for at in range(31):
        talk.say(HELLO[at : at + 1], at)
    assert talk.facts["dpi"] == "undecided"
    talk.say(HELLO[31:32], 31)
    assert talk.facts["dpi"] == "gave-up"
    # It has a name, which is not known: not the same as to have none.
    assert talk.facts["conflict"] == "32 packets with payload did not say it"
    talk.say(HELLO[32:], 32)
    assert "tls_sni" not in talk.facts


def test_the_thirty_second_packet_still_counts() -> None:
    talk = Talk().open()
    for at in range(31):
        talk.say(HELLO[at : at + 1], at)
    talk.say(HELLO[31:], 31)
    assert talk.facts["dpi"] == "decided"


def test_a_hello_of_11_kilobytes_in_segments_of_1024() -> None:
    hello = made_hello([0x1301], [(0x1234, bytes(11_000)), server_name(b"a.test")])
    talk = Talk().open()
    for at in range(0, len(hello), 1024):
        talk.say(hello[at : at + 1024], at)
    assert talk.facts["tls_sni"] == "a.test"


def test_sixteen_kilobytes_and_no_more() -> None:
    long = made_hello([0x1301], [(0x1234, bytes(15000)), server_name(b"a.test")])
    assert Talk().open().say(long).facts["dpi"] == "decided"
    longer = made_hello([0x1301], [(0x1234, bytes(16380)), server_name(b"a.test")])
    longer = record(longer[5:], 8000)
    talk = Talk().open().say(longer[:9000]).say(longer[9000:], 9000)
    reason = "16 KiB did not say it"
    assert talk.facts == {"dpi": "gave-up", "dpi_reason": reason, "conflict": reason, "protocol": "tls"}


def test_ten_seconds_and_no_more() -> None:
    talk = Talk().open().say(HELLO[:100])
    talk.bench.now += 9.9
    Talk(talk.bench, src="192.0.2.9:1").open()
    assert talk.facts["dpi"] == "undecided"
    talk.bench.now += 0.2
    # Whichever packet comes next tells the time.
    Talk(talk.bench, src="192.0.2.9:2").open()
    assert talk.facts["dpi"] == "gave-up"


def test_ten_seconds_begin_with_the_first_payload_of_either_side() -> None:
    talk = Talk()
    talk.send(tcp(talk.src, talk.dst, flags="S", seq=talk.isn))
    talk.answer(b"220 of a server whose SYN was not seen\r\n")
    talk.bench.now += 10.1
    # The client has said nothing that could hide a name.
    assert talk.say(HELLO).facts == {"dpi": "gave-up", "dpi_reason": "10 seconds have passed"}


def test_a_client_that_waits_before_its_first_word_is_heard() -> None:
    talk = Talk().open()
    talk.bench.now += 60
    assert talk.say(HELLO).facts["dpi"] == "decided"


def test_overlaps_that_differ_are_nothing_to_guess_from() -> None:
    other = client_hello("b.server.test")
    talk = Talk().open().say(HELLO[:200]).say(other[100:300], 100)
    assert talk.facts["dpi"] == "gave-up"
    assert "tls_sni" not in talk.facts
    (said,) = talk.bench.said
    assert "segments that overlap differ" in said.message
    assert said.level == "warning"


def test_a_protocol_that_is_not_known_is_given_up_at_once() -> None:
    talk = Talk().open().say(b"\xff\xfe\xfd unknown")
    assert talk.facts["dpi"] == "gave-up"
    assert "protocol" not in talk.facts


def test_a_second_hello_replaces_the_name() -> None:
    talk = Talk().open().say(HELLO)
    talk.say(client_hello("b.server.test"), len(HELLO))
    assert talk.facts["tls_sni"] == "b.server.test"
    assert talk.flow is not None
    assert talk.flow.message == 1


def test_a_second_hello_behind_a_change_of_ciphers_in_one_segment() -> None:
    talk = Talk().open().say(HELLO).say(b"\x14\3\3\0\1\1" + client_hello("b.server.test"), len(HELLO))
    assert talk.facts["tls_sni"] == "b.server.test"


def test_nothing_is_read_behind_the_handshake() -> None:
    talk = Talk().open().say(HELLO).say(b"\x14\3\3\0\1\1\x17\3\3\0\5hello", len(HELLO))
    talk.say(client_hello("b.server.test"), len(HELLO) + 16)
    assert talk.facts["tls_sni"] == "a.server.test"


@pytest.mark.parametrize("cut", [3, 20, None])
def test_a_second_request_replaces_the_facts_split_or_not(cut: int | None) -> None:
    first, second = b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n", b"GET /b HTTP/1.1\r\nHost: b.test\r\n\r\n"
    talk = Talk().open().say(first).say(second[:cut], len(first))
    if cut:
        # At the border of a message nothing is left of the one before.
        assert talk.facts["dpi"] == "undecided"
        assert "http_host" not in talk.facts
        talk.say(second[cut:], len(first) + cut)
    assert talk.facts["http_host"] == "b.test"
    assert talk.facts["http_path"] == "/b"
    assert talk.facts["dpi"] == "decided"


def request(host: str, body: bytes = b"") -> bytes:
    return f"POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.parametrize("where", [slice(0, 1), slice(1, 2), slice(2, 3)])
@pytest.mark.parametrize("cut", [None, 10, 60, 75, 120])
@pytest.mark.parametrize("before", [False, True])
def test_one_of_several_requests_is_denied(where: slice, cut: int | None, before: bool) -> None:
    """Wherever it stands and however it is cut: the packet that completes it does not pass, nor does it when sent again."""
    names = ["a.good.test"] * 3
    names[where] = ["a.evil.test"]
    data = b"".join(request(name, b"x" * 20) for name in names)
    bench = Bench("policy", before=[("dpi", {})], default="drop", rule=[{"action": "accept", "http_host": "*.good.test"}])
    talk = Talk(bench).open()
    at = talk.isn + 1
    if before:
        bench.assert_accepted(tcp(talk.src, talk.dst, request("b.good.test"), seq=at))
        at += len(request("b.good.test"))
    pieces = [(at, data)] if cut is None else [(at, data[:cut]), (at + cut, data[cut:])]
    verdicts = [bench.decide(tcp(talk.src, talk.dst, piece, seq=seq)) for seq, piece in pieces]
    assert DROP in verdicts
    first = verdicts.index(DROP)
    for seq, piece in pieces[first:]:
        bench.assert_dropped(tcp(talk.src, talk.dst, piece, seq=seq))


def test_several_allowed_requests_pass_by_different_rules() -> None:
    rule = [{"action": "accept", "http_host": "a.test"}, {"action": "accept", "http_host": "b.test"}]
    bench = Bench("policy", before=[("dpi", {})], default="drop", rule=rule)
    talk = Talk(bench).open()
    bench.assert_accepted(tcp(talk.src, talk.dst, request("a.test") + request("b.test") + request("a.test"), seq=talk.isn + 1))


def test_a_body_is_passed_over_also_where_a_segment_is_lost() -> None:
    bench = Bench("policy", before=[("dpi", {})], default="drop", rule=[{"action": "accept", "http_host": "a.test"}])
    talk = Talk(bench).open()
    data = request("a.test", request("b.test") * 100) + request("a.test")
    sizes = range(0, len(data), 700)
    order = [0, *list(sizes)[2:-1], 700]
    for at in order:
        bench.assert_accepted(tcp(talk.src, talk.dst, data[at : at + 700], seq=talk.isn + 1 + at))


def test_what_comes_before_its_time_is_dropped_and_passes_when_it_comes_again() -> None:
    bench = Bench("policy", before=[("dpi", {})], default="reject", rule=[{"action": "accept", "http_host": "*.good.test"}])
    talk = Talk(bench).open()
    first, second = request("a.good.test"), request("b.good.test")
    at = talk.isn + 1 + len(first)
    bench.assert_accepted(tcp(talk.src, talk.dst, first, seq=talk.isn + 1))
    held = bench.assert_dropped(tcp(talk.src, talk.dst, second[20:], seq=at + 20))
    # Nobody is reset.
    assert not held.inject
    bench.assert_accepted(tcp(talk.src, talk.dst, second[:20], seq=at))
    bench.assert_accepted(tcp(talk.src, talk.dst, second[20:], seq=at + 20))


@pytest.mark.parametrize("flags", ["PAU", "AU"])
@pytest.mark.parametrize("default", ["drop", "accept"])
def test_urgent_data_in_an_opening_is_a_conflict(flags: str, default: str) -> None:
    rule = [{"action": "accept" if default == "drop" else "drop", "http_host": "*.test"}]
    bench = Bench("policy", before=[("dpi", {})], default=default, rule=rule)
    talk = Talk(bench).open()
    bench.decide(tcp(talk.src, talk.dst, b"GET / HTTP/1.1\r\nHost: a", seq=talk.isn + 1))
    bench.decide(tcp(talk.src, talk.dst, b"x" if "P" in flags else b"", seq=talk.isn + 25, flags=flags))
    bench.assert_dropped(tcp(talk.src, talk.dst, b".test\r\n\r\n", seq=talk.isn + 26))


@pytest.mark.parametrize("order", ["with the data", "behind it", "before it"])
def test_an_end_within_a_request_is_a_conflict(order: str) -> None:
    """Python's server takes the end of the stream for the end of the head."""
    bench = Bench("policy", before=[("dpi", {})], default="accept", rule=[{"action": "drop", "http_host": "*.evil.test"}])
    talk = Talk(bench).open()
    data = b"GET / HTTP/1.1\r\nHost: a.evil.test\r\n\r"
    at = talk.isn + 1
    if order == "with the data":
        bench.assert_dropped(tcp(talk.src, talk.dst, data, seq=at, flags="FPA"))
    elif order == "behind it":
        bench.assert_accepted(tcp(talk.src, talk.dst, data, seq=at))
        bench.assert_dropped(tcp(talk.src, talk.dst, seq=at + len(data), flags="FA"))
    else:
        bench.assert_accepted(tcp(talk.src, talk.dst, seq=at + len(data), flags="FA"))
        bench.assert_dropped(tcp(talk.src, talk.dst, data, seq=at))


@pytest.mark.parametrize("conflict", ["accept", "drop"])
def test_a_conflict_has_an_action_of_its_own(conflict: str) -> None:
    data = b"GET / HTTP/1.2\r\nHost: a.test\r\n\r\n"
    for default in ("accept", "drop"):
        rule = [{"action": "drop", "http_host": "x.test"}]
        bench = Bench("policy", before=[("dpi", {})], default=default, conflict=conflict, rule=rule)
        talk = Talk(bench).open()
        verdict = bench.decide(tcp(talk.src, talk.dst, data, seq=talk.isn + 1))
        assert verdict.action.name.lower() == conflict
    # A rule that asks for no name of HTTP does not mind.
    bench = Bench("policy", before=[("dpi", {})], default="accept", rule=[{"action": "drop", "tls_sni": "x.test"}])
    talk = Talk(bench).open()
    bench.assert_accepted(tcp(talk.src, talk.dst, data, seq=talk.isn + 1))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["a.open.test", "b.open.test", "a.shut.test", "b.shut.test"]), st.booleans()), max_size=6)
)
@pytest.mark.parametrize("kind", ["http", "tls", "dns", "dns over tcp"])
def test_every_message_is_judged_and_a_denied_connection_stays_denied(kind: str, asked: list[tuple[str, bool]]) -> None:
    """Whatever names follow one another, split or not. A datagram is judged by itself; what comes behind a denied message of a
    TCP connection can't arrive without it."""
    key = {"http": "http_host", "tls": "tls_sni"}.get(kind, "dns_name")
    bench = Bench("policy", before=[("dpi", {})], default="accept", rule=[{"action": "drop", key: "*.shut.test"}])
    src, dst = "192.0.2.1:40000", "198.51.100.1:53"
    if kind != "dns":
        Talk(bench, src=src, dst=dst).open()
    asking: dict[str, Callable[[str], bytes]] = {
        "http": lambda name: f"GET / HTTP/1.1\r\nHost: {name}\r\n\r\n".encode(),
        "tls": client_hello,
        "dns": dns_query,
        "dns over tcp": lambda name: over_tcp(dns_query(name)),
    }
    at, denied = 1001, False
    for name, split in asked:
        data = asking[kind](name)
        for piece in (data[:25], data[25:]) if split and kind != "dns" else (data,):
            verdict = bench.decide(udp(src, dst, piece) if kind == "dns" else tcp(src, dst, piece, seq=at)).action
            at += len(piece)
        denied = "shut" in name or (denied and kind != "dns")
        assert verdict is (Action.DROP if denied else Action.ACCEPT)


def test_a_request_that_names_two_hosts_has_none() -> None:
    talk = Talk().open().say(b"GET / HTTP/1.1\r\nHost: a.test\r\nHost: b.test\r\n\r\n")
    assert "http_host" not in talk.facts
    assert talk.facts["http_host_conflict"] is True
    assert talk.bench.said[0].level == "warning"


def test_another_connection_on_the_same_ports_begins_anew() -> None:
    talk = Talk().open().say(HELLO)
    talk.isn, talk.peer = 500_000, 900_000
    talk.send(tcp(talk.src, talk.dst, flags="S", seq=talk.isn))
    # Whether it is one shows when the server answers: anybody can send a SYN.
    assert talk.facts["tls_sni"] == "a.server.test"
    talk.send(tcp(talk.dst, talk.src, flags="SA", seq=talk.peer, ack=talk.isn + 1))
    assert talk.facts == {"dpi": "undecided"}
    assert talk.say(client_hello("b.server.test")).facts["tls_sni"] == "b.server.test"


def test_after_a_fin_a_syn_is_enough() -> None:
    talk = Talk().open().say(HELLO)
    talk.send(tcp(talk.src, talk.dst, flags="FA", seq=talk.isn + 1 + len(HELLO)))
    talk.isn = 700_000
    talk.send(tcp(talk.src, talk.dst, flags="S", seq=talk.isn))
    assert talk.facts == {"dpi": "undecided"}


def test_a_policy_does_not_judge_a_new_connection_by_the_old_ones_name() -> None:
    rule = ({"action": "accept", "tls_sni": ["b.*"]},)
    bench = Bench("policy", before=[("dpi", {})], default="drop", rule=rule)
    talk = Talk(bench).open()
    bench.assert_dropped(tcp(talk.src, talk.dst, HELLO, seq=talk.isn + 1))
    bench.assert_dropped(tcp(talk.src, talk.dst, HELLO, seq=talk.isn + 1, flags="FPA"))
    bench.assert_accepted(tcp(talk.src, talk.dst, flags="S", seq=5_000_000))
    bench.assert_accepted(tcp(talk.src, talk.dst, client_hello("b.server.test"), seq=5_000_001))


def test_a_syn_that_no_server_answers_changes_nothing() -> None:
    talk = Talk().open().say(HELLO)
    talk.send(tcp(talk.src, talk.dst, flags="S", seq=9))
    talk.send(tcp(talk.src, talk.dst, b"x", seq=10))
    assert talk.facts["tls_sni"] == "a.server.test"


def test_dns_facts_are_those_of_the_latest_message() -> None:
    bench = Bench("dpi")
    talk = Talk(bench)
    src, dst = "192.0.2.1:5000", "198.51.100.1:53"
    talk.send(udp(src, dst, dns_query("a.test")))
    assert talk.facts == {"dpi": "decided", "protocol": "dns", "dns_name": ("a.test",), "dns_type": ("A",)}
    reply = dns_query("a.test", flags=0x8180)
    reply = reply[:6] + b"\0\1" + reply[8:] + b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4\xc0\0\2\x07"
    talk.send(udp(dst, src, reply))
    assert talk.facts["dns_answers"] == ("192.0.2.7",)
    talk.send(udp(src, dst, dns_query("b.test", 28)))
    assert (talk.facts["dns_name"], talk.facts["dns_type"]) == (("b.test",), ("AAAA",))


def test_a_query_behind_rubbish_from_the_same_port_is_seen() -> None:
    talk = Talk()
    for _ in range(40):
        talk.send(udp("192.0.2.1:5000", "198.51.100.1:53", b"rubbish"))
    assert talk.facts["dpi"] == "gave-up"
    talk.send(udp("192.0.2.1:5000", "198.51.100.1:53", dns_query("a.test") + b"\0"))
    assert talk.facts["dns_name"] == ("a.test",)


def test_elsewhere_rubbish_behind_a_message_makes_it_none() -> None:
    talk = Talk()
    talk.send(udp("192.0.2.1:5000", "198.51.100.1:5001", dns_query("a.test") + b"\0"))
    assert talk.facts == {"dpi": "undecided"}


def test_what_can_not_be_read_does_not_inherit_an_accept() -> None:
    bench = Bench("policy", before=[("dpi", {})], default="drop", rule=[{"action": "accept", "dns_name": "*.good.test"}])
    src, dst = "192.0.2.1:5000", "198.51.100.1:53"
    bench.assert_accepted(udp(src, dst, dns_query("a.good.test")))
    bench.assert_dropped(udp(src, dst, b"rubbish"))
    bench.assert_accepted(udp(src, dst, dns_query("a.good.test")))


def test_udp_that_is_not_known_is_given_up_after_thirty_two() -> None:
    talk = Talk()
    for _ in range(32):
        talk.send(udp("192.0.2.1:5000", "198.51.100.1:5001", b"rubbish"))
    assert talk.facts["dpi"] == "gave-up"


def test_later_queries_over_tcp() -> None:
    first, second = over_tcp(dns_query("a.test")), over_tcp(dns_query("b.test"))
    talk = Talk(dst="198.51.100.1:53").open().say(first).say(second, len(first))
    assert talk.facts["dns_name"] == ("b.test",)


@pytest.mark.parametrize("names", [("a.good.test", "a.evil.test"), ("a.evil.test", "a.good.test")])
@pytest.mark.parametrize("cut", [None, 10, 50])
@pytest.mark.parametrize("first", [None, "b.good.test"])
def test_queries_in_one_segment_are_all_looked_at(names: tuple[str, str], cut: int | None, first: str | None) -> None:
    dst = "198.51.100.1:53"
    data = b"".join(over_tcp(dns_query(name)) for name in names)
    for default, action in (("drop", "accept"), ("accept", "drop")):
        name = "*.good.test" if action == "accept" else "*.evil.test"
        rule = [{"action": action, "dns_name": name}]
        bench = Bench("policy", before=[("dpi", {})], default=default, undecided="accept", rule=rule)
        talk = Talk(bench, dst=dst).open()
        at = talk.isn + 1
        if first is not None:
            opening = over_tcp(dns_query(first))
            bench.assert_accepted(tcp(talk.src, dst, opening, seq=at))
            at += len(opening)
        verdicts = [bench.decide(tcp(talk.src, dst, data[:cut], seq=at))]
        if cut is not None:
            talk.answer(b"")
            verdicts.append(bench.decide(tcp(talk.src, dst, data[cut:], seq=at + cut)))
        # Whichever packet completes the evil one does not pass.
        assert DROP in verdicts


def test_too_many_messages_in_one_packet_are_given_up() -> None:
    talk = Talk(dst="198.51.100.1:53").open().say(over_tcp(dns_query("a.good.test")) * 300)
    assert talk.facts["dpi"] == "gave-up"
    assert talk.facts["conflict"] == "too many messages in one packet"


def test_quic_without_cryptography_is_quic_without_a_name_and_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quic, "AVAILABLE", False)
    bench = Bench("dpi")
    header = b"\xc3\0\0\0\1\x08" + bytes(8) + b"\0\0" + struct.pack("!H", 0x4000 | 1180)
    datagram = header + bytes(1200 - len(header) + 200)
    for port in (1, 2):
        talk = Talk(bench)
        talk.send(udp(f"192.0.2.1:{port}", "198.51.100.1:443", datagram))
        assert talk.facts["protocol"] == "quic"
        assert talk.facts["quic_version"] == "1"
        assert talk.facts["dpi"] == "gave-up"
    assert len(bench.said) == 1


def test_ipv6_extension_headers_are_in_nobodys_way() -> None:
    talk = Talk(src=CLIENT6, dst=SERVER6)
    for plain in (
        tcp(CLIENT6, SERVER6, flags="S", seq=talk.isn),
        tcp(CLIENT6, SERVER6, HELLO, seq=talk.isn + 1),
    ):
        raw = plain.payload
        # Hop-by-hop and destination options, both of padding (RFC 8200 4.2).
        options = b"\x3c\0\1\4\0\0\0\0" + b"\6\0\1\4\0\0\0\0"
        talk.send(Packet(ip_packet(raw[8:24], raw[24:40], 0, options + raw[40:])))
    assert talk.facts["tls_sni"] == "a.server.test"


def test_cut_packets_are_said_once_and_nothing_is_made_of_them() -> None:
    talk = Talk().open()
    for at in (0, 200):
        whole = tcp(talk.src, talk.dst, HELLO[at:], seq=talk.isn + 1 + at)
        talk.send(Packet(whole.payload[:128], length=len(whole.payload)))
    assert len(talk.bench.said) == 1
    assert "cut at 128 bytes" in talk.bench.lines[0]
    assert "tls_sni" not in talk.facts


def test_the_log_says_what_each_flow_is() -> None:
    bench = Bench("dpi", log=True)
    Talk(bench).open().say(HELLO)
    Talk(bench, src="192.0.2.1:2").open().say(b"\xff" * 20)
    Talk(bench, dst="198.51.100.1:53").send(udp("192.0.2.1:5000", "198.51.100.1:53", dns_query("a.test", 28)))
    assert bench.lines == [
        "tcp 192.0.2.1:40000 -> 198.51.100.1:443: tls a.server.test",
        "tcp 192.0.2.1:2 -> 198.51.100.1:443: not identified: no protocol that is known here",
        "udp 192.0.2.1:5000 -> 198.51.100.1:53: dns a.test",
    ]
    assert bench.said[0].fields["tls_sni"] == "a.server.test"
    assert bench.said[0].fields["dpi"] == "decided"
    assert bench.said[2].fields["dns_type"] == "AAAA"


class Reader(PacketElement):
    """An element of somebody else, behind `dpi`."""

    needs = Needs.FLOW

    def decide(self, packet: Packet, flow: Flow | None) -> Verdict | None:
        return DROP if flow is not None and flow.facts.get("tls_sni") == "a.server.test" else None


def test_elements_of_others_read_the_facts() -> None:
    bench = Bench(Reader, before=[("dpi", {})])
    talk = Talk(bench).open()
    bench.assert_dropped(tcp(talk.src, talk.dst, HELLO, seq=talk.isn + 1))
    bench.assert_accepted(tcp("192.0.2.1:2", talk.dst, HELLO, seq=1))


def test_other_protocols_are_left_alone() -> None:
    element = Dpi("dpi", DpiOptions(), lambda *_, **__: None)
    packet = Packet(ip_packet(b"\1\2\3\4", b"\1\2\3\5", 47, bytes(20)), time=1.0)
    flow = Flow(packet.headers.five_tuple, 1.0, 1.0)
    assert element.decide(packet, flow) is None
    assert flow.facts["dpi"] == "gave-up"
    assert element.decide(packet, None) is None


def test_flows_whose_bytes_are_kept_are_bounded() -> None:
    bench = Bench("dpi", openings=10)
    talks = [Talk(bench, src=f"192.0.2.1:{port}").open().say(HELLO[:50]) for port in range(1, 31)]
    assert [talk.facts["dpi"] for talk in talks] == ["gave-up"] * 20 + ["undecided"] * 10


def test_the_memory_of_a_flood_is_as_stated() -> None:
    """docs/dpi.md states 1.1 KiB a flow that only sent its SYN (1.2 at most), and 16 KiB for each of `openings`."""
    flows = 4000
    element = Dpi("dpi", DpiOptions(), lambda *_, **__: None)
    table = FlowTable(flows)
    packets = [tcp(f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}:1024", SERVER, flags="S", seq=n) for n in range(flows)]
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(3 * flows):
            packet = packets[number % flows]
            packet._headers = None  # noqa: SLF001  # what is kept is what is bounded
            element.decide(packet, table.observe(packet.headers.five_tuple, 1.0 + number * 1e-4))
            packet._headers = None  # noqa: SLF001  # what is kept is what is bounded
        per_flow = (tracemalloc.get_traced_memory()[0] - before) / flows
    finally:
        tracemalloc.stop()
    assert len(table) <= flows
    assert 300 < per_flow < 1229, per_flow
