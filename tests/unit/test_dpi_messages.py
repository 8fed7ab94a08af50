"""The `dpi` element from message to message: each is judged, and what cannot be read inherits no accept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from examples import EXAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st
from openings import client_hello, dns_query, over_tcp
from talk import HELLO, Talk

from nfq_agent.testing import Bench, tcp, udp
from nfq_agent.verdict import DROP, Action


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
    """Wherever it is and however it is cut: the packet that completes it does not pass, nor does it when sent again."""
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
    data = request("a.test", b"body: " + request("b.test") * 100) + request("a.test")
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
    # No connection is reset.
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


@settings(max_examples=EXAMPLES * 3 // 5)
@given(
    st.lists(st.tuples(st.sampled_from(["a.open.test", "b.open.test", "a.shut.test", "b.shut.test"]), st.booleans()), max_size=6)
)
@pytest.mark.parametrize("kind", ["http", "tls", "dns", "dns over tcp"])
def test_every_message_is_judged_and_a_denied_connection_stays_denied(kind: str, asked: list[tuple[str, bool]]) -> None:
    """Whatever names follow one another, split or not. A datagram is judged by itself; what comes behind a denied message of a
    TCP connection cannot arrive without it."""
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
