"""What a ClientHello says besides its name, where a policy reads that: answers are told apart by it."""

from __future__ import annotations

from typing import Final

import pytest
from flow_judges import POLICIES, judge, quick
from hypothesis import given
from hypothesis import strategies as st
from openings import client_hello, made_hello, numbers, server_name
from tcp_openings import CLIENT, HELLO, REST, SERVER, found, segments, start

from nfq_agent.context import Context
from nfq_agent.flow_memory import SIZE, FlowMemory
from nfq_agent.openings import name_in_opening, told_in_hello
from nfq_agent.testing import tcp
from nfq_agent.unshown import details_of, facts_of
from nfq_agent.verdict import ACCEPT

FINGERPRINT: Final = {
    "default": "drop",
    "rule": [{"action": "accept", "ja4": [str(facts_of("tls", "x", details_of(HELLO))["ja4"])]}],
}
OTHER: Final = client_hello("www.good.test", alpn=("http/1.1",))


def test_hellos_are_told_apart_by_what_the_policy_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "one", FINGERPRINT)
    whole = judge(["one"])
    judged, table = quick(["one"])
    shown = []
    for port, message in enumerate((HELLO, OTHER, HELLO, client_hello("www.bad.test", alpn=("h2", "http/1.1")), OTHER)):
        client = f"192.0.2.1:{40000 + port}"
        for packet in start(client) + segments(message, [100] if port == 2 else [], client):
            got = found(table, packet)
            shown += [port] if got is None else []
            assert (got or judged.verdict(packet)) == whole.verdict(packet)
    # The name does not matter to it.
    assert shown == [1, 4]


def test_a_connection_that_is_handed_over_keeps_what_its_hello_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the server has acknowledged it, so that its bytes are gone; and in the memory."""
    monkeypatch.setitem(POLICIES, "one", FINGERPRINT)
    memories = [FlowMemory(memoryview(bytearray(SIZE)), bytes(16)) for _ in range(2)]
    whole = judge(["one"], context=Context(flows=memories[0]))
    judged, table = quick(["one"], memories[1])
    end = 6 + len(HELLO)
    packets = [
        *start(),
        *segments(HELLO, []),
        tcp(SERVER, CLIENT, b"x" * 50, seq=10, ack=end),
        tcp(CLIENT, SERVER, REST, seq=end, ack=60),
    ]
    for packet in packets:
        assert found(table, packet) is whole.verdict(packet) is ACCEPT
    ends = packets[0].headers.five_tuple
    assert memories[0].recall(ends) == memories[1].recall(ends)
    (flow,) = judged.show_openings(8)
    assert whole.flows is not None
    other = whole.flows.find(ends)
    assert other is not None
    assert flow.facts == other.facts
    again = tcp(CLIENT, SERVER, flags="FA", seq=end + len(REST), ack=60)
    assert judged.verdict(again) is whole.verdict(again) is ACCEPT


VALUES: Final = st.sampled_from([
    server_name(b"a.test"), (0xFE0D, b""), numbers(10, 23), numbers(10, 23, 24), numbers(13, 0x403), (10, b""), (11, b"\1\0"),
    (11, b""), (16, b"\0\3\2h2"), (16, b"\0\4\3abc"), (43, b"\2\3\4"), (43, b"\4\3\3\x0a\x0a"), (0xFE0D, b"\0x"), (0xFE0D, b"\1"),
    (0x0A0A, b""), (51, b"xyz"), (51, b"abcd"), (35, b""), (21, bytes(9)),
])  # fmt: skip
HELLOS: Final = st.builds(
    made_hello,
    st.lists(st.sampled_from([0x1301, 0x1302, 0x0A0A]), max_size=3),
    st.lists(VALUES, max_size=4).map(lambda some: [server_name(b"b.test"), *some]),
    session=st.sampled_from([b"", bytes(32)]),
    version=st.sampled_from([0x0303, 0x0301]),
)


@given(HELLOS, HELLOS)
def test_what_is_told_apart_says_what_the_parser_says(one: bytes, other: bytes) -> None:
    told = told_in_hello(one), told_in_hello(other)
    if told[0] is not None and told[0] == told[1]:
        assert details_of(one) == details_of(other)
    if told[0] is None:
        assert name_in_opening(one) is None


NEW: Final = st.sampled_from([(51, b"x"), (51, b"yz"), (21, b""), (21, bytes(5)), (35, b"t")])


@given(st.lists(NEW, min_size=2, max_size=2), st.binary(max_size=32))
def test_what_is_new_in_each_hello_is_not_told_apart(values: list[tuple[int, bytes]], session: bytes) -> None:
    made = [
        made_hello([0x1301], [server_name(name), (kind, value), numbers(10, 23)], session=some)
        for (kind, value), name, some in zip(values, (b"a.test", b"bb.test"), (b"", session), strict=True)
    ]
    same = values[0][0] == values[1][0]
    assert (told_in_hello(made[0]) == told_in_hello(made[1])) == same


def test_a_hello_that_says_too_much_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "one", FINGERPRINT)
    _, table = quick(["one"])
    long = made_hello([1] * 600, [server_name(b"www.good.test")])
    assert name_in_opening(long) == ("tls", "www.good.test")
    assert told_in_hello(long) is None
    assert [found(table, packet) for packet in start() + segments(long, [])] == [ACCEPT, ACCEPT, ACCEPT, None]
