"""Openings that are read and answered without an element: they say what the parsers, the elements and the memory say."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Final

import pytest
from flow_judges import conversations, judge
from hypothesis import example, given, settings
from hypothesis import strategies as st
from openings import client_hello, made_hello, numbers, server_name
from tcp_openings import BAD, CLIENT, HEAD, HELLO, REST, SERVER, opening

from nfq_agent.context import Context
from nfq_agent.flow import Opening
from nfq_agent.flow_memory import SIZE, FlowMemory, text_of
from nfq_agent.flow_table import FlowTable
from nfq_agent.openings import Openings, groups_that_fit, name_in_opening
from nfq_agent.packet import FiveTuple, address
from nfq_agent.patterns import Patterns
from nfq_agent.protocols import Found, http1, parse_first, tls
from nfq_agent.protocols.known import PARSERS
from nfq_agent.testing import tcp
from nfq_agent.verdict import ACCEPT


def check_name(data: bytes) -> None:
    """What is found in the plain form is what the parsers find."""
    named = name_in_opening(data)
    if named is None:
        return
    protocol, name = named
    (parser,), found = parse_first(PARSERS, data, b"")
    assert found == parser(data, b"")
    assert isinstance(found, Found)
    then = {"http": http1.parse, "tls": tls.after_hello}[protocol]
    assert (found.decided, found.done, found.used, found.skip, found.then) == (True, True, len(data), 0, then)
    assert found.facts["protocol"] == protocol
    assert found.facts[{"http": "http_host", "tls": "tls_sni"}[protocol]] == name
    assert not {"conflict", "tls_early_data", "dot"} & found.facts.keys()


@given(st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=3), st.integers(0, 3), st.binary(max_size=2))
def test_a_hello_says_what_the_parser_says(changes: list[tuple[int, int]], cut: int, behind: bytes) -> None:
    data = bytearray(HELLO[: len(HELLO) - cut] + behind)
    for at, value in changes:
        # Mostly in the extensions, where the lengths are.
        data[at % len(data)] = value
    check_name(bytes(data))


EXTENSIONS = st.sampled_from([
    server_name(b"www.good.test"), server_name(b"WWW.Good.Test"), server_name(b"good.test."), server_name(b"a..b"), (0, b""),
    server_name(b"a" * 64 + b".test"), server_name(b"192.0.2.1"), (0, b"\0\0"), (0, b"\0\x09\0\0\1a\0\0\1b"),
    numbers(10, 23), numbers(13, 0x403), (10, b"\0"), (10, b"\0\3\0\0\0"), (11, b"\1\0"), (16, b"\0\3\2h2"), (16, b"\0\4\3dot"),
    (16, b"\0\0"), (16, b"\0\5\2h2"), (43, b"\2\3\4"), (43, b"\3\3\4\0"), (43, b""), (42, b""), (0xFE0D, b"\0x"), (0x0A0A, b""),
    (51, b"xyz"), (35, b""),
])  # fmt: skip


@given(st.lists(EXTENSIONS, max_size=6), st.binary(max_size=32), st.sampled_from([0x0303, 0x0301, 0x0203, 0x0304]))
def test_a_made_hello_says_what_the_parser_says(extensions: list[tuple[int, bytes]], session: bytes, version: int) -> None:
    data = made_hello([0x1301, 0x0A0A], extensions, session=session, version=version)
    check_name(data)
    if extensions == [server_name(b"www.good.test")] and version == 0x0303:
        assert name_in_opening(data) == ("tls", "www.good.test")


@given(
    st.sampled_from(
        [b"a.test", b"A.Test:80", b"a.test.", b"a..b", b"[::1]", b"a_b-c.test ", b"", b"a.test:", b"a b", b"a.test:x"]
    )
)
def test_a_request_says_what_the_parser_says(host: bytes) -> None:
    check_name(b"GET / HTTP/1.1\r\nX: y\r\nHost: %s\r\n\r\n" % host)
    check_name(b"GET / HTTP/1.1\r\nHost: %s\r\nHost: b.test\r\n\r\n" % host)


def test_what_programs_send_is_plain() -> None:
    assert name_in_opening(HELLO) == ("tls", "www.good.test")
    assert name_in_opening(HEAD) == ("http", "www.good.test")
    assert not any(name_in_opening(data[:at]) for data in (HELLO, HEAD) for at in range(len(data)))


def test_a_connection_that_is_accepted_is_never_shown() -> None:
    table = judge(["allow-list"]).settle_flows()
    assert isinstance(table, FlowTable)
    for start in (5, 0xFFFFFFFF, 77):
        for message, more in ((HELLO, REST), (HEAD, HEAD)):
            # The second and later ones have the five-tuple of one that is over.
            packets = opening(message, start=start, more=more)
            assert {table.look_up(packet.payload, packet.length, 1.0) for packet in packets} == {ACCEPT}
    assert len(table) == 1
    flow = table.observe(tcp(CLIENT, SERVER).headers.five_tuple, 2.0)
    assert isinstance(flow.opening, Opening)
    assert (flow.opening.protocol, flow.opening.name, flow.opening.closed) == ("http", "www.good.test", True)


@pytest.mark.parametrize(
    ("message", "more"),
    [
        (client_hello("www.bad.test"), b""),
        (HEAD.replace(b"good", b"bad"), b""),
        (HEAD, HEAD.replace(b"good", b"bad")),
        (HELLO, client_hello("www.bad.test")),
        (b"SSH-2.0-x\r\n", b""),
        (HELLO[:9], HELLO[9:]),
        (HEAD, b"POST / HTTP/1.1\r\nHost: www.good.test\r\nContent-Length: 1\r\n\r\n"),
    ],
    ids=["hello", "request", "later-request", "later-hello", "other", "short-segment", "body"],
)
def test_what_is_not_accepted_is_shown_and_judged_as_ever(message: bytes, more: bytes) -> None:
    whole, quick = judge(["allow-list"]), judge(["allow-list"])
    table = quick.settle_flows()
    assert isinstance(table, FlowTable)
    shown = 0
    for packet in opening(message, more=more):
        whole.now = quick.now = 1.0
        got = table.look_up(packet.payload, packet.length, 1.0)
        shown += got is None
        assert (got or quick.verdict(packet)) == whole.verdict(packet)
    assert shown


@pytest.mark.parametrize("tuples", [3, 6, 60000])
def test_what_is_known_of_a_connection_is_the_same(tuples: int) -> None:
    """The memory has the same connections, and a flow that is shown at last has the same facts."""
    compared = 0
    for seed in range(3):
        memories = [FlowMemory(memoryview(bytearray(SIZE)), bytes(16)) for _ in range(2)]
        whole, quick = (judge(["left-open", "allow-list"], context=Context(flows=memory)) for memory in memories)
        table = quick.settle_flows()
        assert isinstance(table, FlowTable)
        seen = set()
        for now, packet in conversations(seed, 40, tuples):
            whole.now = quick.now = now
            wanted = whole.verdict(packet)
            got = table.look_up(packet.payload, packet.length, now, packet.checksum_ready) or quick.verdict(packet)
            assert got == wanted
            five_tuple = packet.headers.five_tuple
            if five_tuple.protocol == 6:
                seen.add(five_tuple)
        for five_tuple in seen:
            known = [memory.recall(five_tuple) for memory in memories]
            if known[0] is None or known[1] is None:
                assert known[0] is known[1]
                continue
            assert known[0][0] == known[1][0]
            # Of an opening that was not shown the memory has what answers follow from.
            assert known[1][1].items() <= known[0][1].items()
            compared += 1
    assert compared


@settings(max_examples=20)
@given(st.integers(0, 1 << 30))
def test_the_memory_is_written_as_python_writes_it(seed: int) -> None:
    source = random.Random(seed)
    here, there = (FlowMemory(memoryview(bytearray(SIZE)), bytes(range(16))) for _ in range(2))
    facts = {"dpi": "decided", "protocol": "tls", "tls_sni": "www.good.test"}
    text = b'{"dpi":"decided","protocol":"tls","tls_sni":"www.good.test"}'
    table = FlowTable()
    table.judge_openings(Openings(lambda protocol, *_: (text if protocol else b"", ()), (), (53,), there))
    for _ in range(6):
        width = source.choice((4, 16))
        low, high = bytes(width - 1) + bytes((source.randrange(2),)), b"\2" * width
        number = source.randrange(3)
        ends = FiveTuple(6, low, 40000 + number, high, 443) if number else FiveTuple(6, high, 40000, low, 443)
        now = source.randrange(100) * 1.0
        client, server = (f"[{text}]:{port}" for text, port in named(ends))
        for packet in opening(HELLO, client, server):
            table.look_up(packet.payload, packet.length, now)
        here.keep(ends, facts, True, now)
    assert bytes(here.room) == bytes(there.room)


def named(ends: FiveTuple) -> Iterator[tuple[str, int]]:
    """The ends as text."""
    yield address(ends.src), ends.sport or 0
    yield address(ends.dst), ends.dport or 0


def test_a_chain_that_fails_is_asked_again_and_the_packet_is_shown() -> None:
    asked = []

    def foresee(protocol: str, *_: object) -> tuple[bytes, tuple[int, ...]]:
        asked.append(protocol)
        raise ValueError("broken")

    table = FlowTable()
    table.judge_openings(Openings(foresee, ("dst", "dport", "src", "sport"), (53,), None))
    for packet in opening(HELLO):
        assert table.look_up(packet.payload, packet.length, 1.0) is None
    assert asked == [""]
    assert len(table) == 0


def test_as_many_openings_are_shown_as_are_wanted() -> None:
    table = judge(["allow-list"]).settle_flows()
    assert isinstance(table, FlowTable)
    table.shows_openings = 2
    shown = []
    for port in range(4):
        (syn, *_) = opening(HELLO, client=f"192.0.2.1:{50000 + port}")
        shown.append(table.look_up(syn.payload, syn.length, 1.0) is None)
    assert shown == [True, True, False, False]
    assert table.shows_openings == 0


def test_what_is_forgotten_without_being_shown_is_counted() -> None:
    table = FlowTable(limit=2)
    table.judge_openings(Openings(lambda *_: (b"", ()), (), (53,), None))
    for port in range(5):
        (syn, *_) = opening(HELLO, f"10.0.0.1:{40000 + port}")
        assert table.look_up(syn.payload, syn.length, 1.0) is ACCEPT
    assert (len(table), table.passed_by) == (2, 3)
    table.observe(tcp("10.0.0.1:1", "10.0.0.2:2").headers.five_tuple, 1.0)
    table.observe(tcp("10.0.0.1:2", "10.0.0.2:2").headers.five_tuple, 1.0)
    table.observe(tcp("10.0.0.1:3", "10.0.0.2:2").headers.five_tuple, 1.0)
    assert table.passed_by == 5


def test_flows_are_found_a_few_places_at_once() -> None:
    table = FlowTable()
    table.judge_openings(Openings(lambda *_: (b"", ()), (), (53,), None))
    flows = [table.observe(tcp(f"10.0.0.1:{port}", "10.0.0.2:2").headers.five_tuple, 1.0) for port in range(5)]
    # One that no element was shown is not among them.
    (syn, *_) = opening(HELLO)
    assert table.look_up(syn.payload, syn.length, 1.0) is ACCEPT
    found, place = [], 1
    while place:
        some, place = table.flows_from(place, 2)
        assert len(some) <= 2
        found += some
    assert found == flows


def test_ports_that_stand_apart_are_shown() -> None:
    table = FlowTable()
    table.judge_openings(Openings(lambda *_: (b"", ()), (), (53,), None))
    for packet in opening(HELLO, server="198.51.100.1:53"):
        assert table.look_up(packet.payload, packet.length, 1.0) is None
    with pytest.raises(ValueError, match="four ports"):
        Openings(lambda *_: (b"", ()), (), (1, 2, 3, 4, 5), None)


@pytest.mark.parametrize(("name", "unshown"), [("allow-list", True), ("block-list", True), ("allow-list-careful", False)])
def test_openings_are_answered_where_the_chain_lets_them_pass_at_first(name: str, unshown: bool) -> None:
    table = judge([name]).settle_flows()
    assert isinstance(table, FlowTable)
    (syn, *_) = opening(HELLO)
    assert (table.look_up(syn.payload, syn.length, 1.0) is ACCEPT) == unshown


RECORDS: Final = (
    b"\x14\3\3\0\1\1", b"\x15\3\3\0\2\1\0", b"\x16\3\3\0\0", b"\x16\3\3\0\4\x10\0\0\0", BAD, HELLO, REST[6:], b"\x14\3\3\0\0",
    b"\x15\3\3", b"\x16\3\3\0\4", b"\x18\3\3\0\0",
)  # fmt: skip


@given(st.lists(st.lists(st.sampled_from(RECORDS), min_size=1, max_size=3), min_size=1, max_size=3))
@example([[RECORDS[2], BAD]])
@example([[RECORDS[0]], [RECORDS[2], BAD]])
def test_records_behind_a_hello_are_read_as_the_parser_reads_them(segments: list[list[bytes]]) -> None:
    whole, quick = judge(["allow-list"]), judge(["allow-list"])
    table = quick.settle_flows()
    assert isinstance(table, FlowTable)
    packets = list(opening(HELLO, ends=False))
    at = 6 + len(HELLO)
    for records in segments:
        data = b"".join(records)
        packets.append(tcp(CLIENT, SERVER, data, seq=at, ack=110))
        at += len(data)
        packets.append(tcp(SERVER, CLIENT, flags="A", seq=110, ack=at))
    for packet in packets:
        got = table.look_up(packet.payload, packet.length, 1.0)
        assert (got or quick.verdict(packet)) == whole.verdict(packet)


def test_a_reset_and_a_repeated_syn_with_another_number_are_shown() -> None:
    whole, quick = judge(["allow-list"]), judge(["allow-list"])
    table = quick.settle_flows()
    assert isinstance(table, FlowTable)
    packets = [
        *opening(HELLO, ends=False), tcp(CLIENT, SERVER, flags="S", seq=900),
        tcp(CLIENT, SERVER, client_hello("a.bad.test"), seq=901), tcp(CLIENT, SERVER, client_hello("a.bad.test"), seq=6),
        tcp(SERVER, CLIENT, flags="R", seq=10),
    ]  # fmt: skip
    shown = 0
    for packet in packets:
        whole.now = quick.now = 1.0
        got = table.look_up(packet.payload, packet.length, 1.0)
        shown += got is None
        assert (got or quick.verdict(packet)) == whole.verdict(packet)
    assert shown


def test_connections_that_no_element_was_shown_are_handed_over_a_few_at_once() -> None:
    table = FlowTable()
    table.judge_openings(Openings(lambda *_: (b"", ()), (), (53,), None))
    for port in range(3):
        for packet in opening(HELLO, f"10.0.0.1:{40000 + port}"):
            assert table.look_up(packet.payload, packet.length, 1.0) is ACCEPT
    assert table.flows() == []
    handed = table.show_openings(2.0, 2) + table.show_openings(2.0, 2)
    assert table.show_openings(2.0, 2) == []
    assert sorted(flow.origin.sport for flow in handed if flow.origin.sport) == [40000, 40001, 40002]
    assert all(flow.opening is not None and flow.opening.protocol == "tls" for flow in handed)
    assert len(table.flows()) == 3
    # From now on their packets are shown.
    packet = tcp("10.0.0.1:40000", "10.0.0.2:443", b"more", seq=5000)
    assert table.look_up(packet.payload, packet.length, 3.0) is None


LABELS: Final = st.sampled_from(["a", "b", "good", "test", "x-1", "_c"])
NAMES: Final = st.lists(LABELS, min_size=1, max_size=4).map(".".join)
GLOBS: Final = st.one_of(NAMES, NAMES.map("*.{}".format), NAMES.map("{}.".format), NAMES.map(str.upper))


@given(st.lists(st.lists(GLOBS, max_size=6), max_size=5), st.lists(NAMES, min_size=1, max_size=5))
@example([[""], ["a"]], ["a"])
def test_a_name_fits_the_groups_that_it_fits_in_python(groups: list[list[str]], names: list[str]) -> None:
    patterns = [Patterns(globs, caseless=True) for globs in groups]
    plain = [each.plain for each in patterns if each.plain is not None]
    assert len(plain) == len(patterns)
    for name in names:
        fits = groups_that_fit(plain, name)
        assert [bool(fits >> place & 1) for place in range(len(patterns))] == [each.match(name) for each in patterns]


def test_other_patterns_are_not_plain() -> None:
    for glob in ("a*.test", "*a.test", "a?", "[ab].test", "*", "*.*"):
        assert Patterns([glob], caseless=True).plain is None


def test_the_chain_is_asked_once_for_all_names_that_fit_the_same_patterns() -> None:
    asked: list[str] = []
    here, there = (FlowMemory(memoryview(bytearray(SIZE)), bytes(16)) for _ in range(2))
    long = "x" * 260

    def foresee(protocol: str, _: FiveTuple, name: str) -> tuple[bytes, tuple[int, ...]] | None:
        asked.append(name)
        facts = {"dpi": "decided", "protocol": "tls", "tls_sni": name, "reason": long}
        return None if name.endswith(".other.test") else (text_of(facts) if protocol else b"", ())

    table = FlowTable()
    names = [({"www.good.test"}, {"good.test"}), ({"a.other.test"}, set())]
    table.judge_openings(Openings(foresee, (), (53,), there, None, names))
    hosts = [
        "b.good.test",
        "c.good.test",
        "tls.good.test",
        f"{'d' * 60}.good.test",
        "www.good.test",
        "a.other.test",
        "b.other.test",
    ]
    shown = []
    for port, host in enumerate(hosts):
        packets = list(opening(client_hello(host), f"10.0.0.1:{40000 + port}", ends=False))[:4]
        shown += [host for packet in packets if table.look_up(packet.payload, packet.length, 1.0) is None]
        if not host.endswith(".other.test"):
            facts = {"dpi": "decided", "protocol": "tls", "tls_sni": host, "reason": long}
            here.keep(packets[0].headers.five_tuple, facts, True, 1.0)
    assert shown == ["a.other.test", "b.other.test"]
    # The SYN, the names below good.test, the one whose facts have no room, and those of the other group and of none.
    assert asked == ["", "b.good.test", f"{'d' * 60}.good.test", "a.other.test", "b.other.test"]
    assert bytes(here.room) == bytes(there.room)
