"""What a ClientHello says besides its name, where a policy reads that: answers are told apart by it."""

from __future__ import annotations

from typing import Final

import pytest
from examples import EXAMPLES
from flow_judges import POLICIES, judge, quick
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openings import client_hello, made_hello, numbers, server_name
from tcp_openings import CLIENT, HELLO, REST, SERVER, found, segments, start

from nfq_agent.context import Context
from nfq_agent.flow_memory import SIZE, FlowMemory
from nfq_agent.openings import details_in_hello, name_in_opening, told_in_hello
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


# Its ALPN has to be escaped, which is left to the parser.
ODD: Final = made_hello([0x1301], [server_name(b"www.good.test"), (16, b"\0\2\1\xe9")])


@pytest.mark.parametrize("hello", [HELLO, ODD], ids=["usual", "odd"])
def test_a_connection_that_is_handed_over_keeps_what_its_hello_said(hello: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the server has acknowledged it, so that its bytes are gone; and in the memory."""
    assert (details_in_hello(hello) is None) == (hello == ODD)
    accepted = str(facts_of("tls", "x", details_of(hello))["ja4"])
    monkeypatch.setitem(POLICIES, "one", {"default": "drop", "rule": [{"action": "accept", "ja4": [accepted]}]})
    memories = [FlowMemory(memoryview(bytearray(SIZE)), bytes(16)) for _ in range(2)]
    whole = judge(["one"], context=Context(flows=memories[0]))
    judged, table = quick(["one"], memories[1])
    end = 6 + len(hello)
    packets = [
        *start(),
        *segments(hello, []),
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


# Numbers that mean something, RFC 8701's, those just beside, and the ends.
KNOWN: Final = st.sampled_from([0, 1, 9, 10, 0xFF, 0x0A0A, 0x1A1A, 0xFAFA, 0x0A1A, 0x0B0B, 0x1301, 0xC02F, 0xFFFF])
ANY: Final = KNOWN | st.integers(0, 0xFFFF)
SOME: Final = st.lists(ANY, max_size=8)
PROTOCOLS: Final = st.lists(
    st.sampled_from([
        b"", b"h", b"h2", b"http/1.1", b"\xe9", b"a\xff", b"-x", b"x-", b'"', b"a\\b", b"\x7f", b"\x1f", b"~ ", b"z" * 255,
    ])
    | st.binary(max_size=3),
    max_size=3,
)  # fmt: skip


def alpn(names: list[bytes]) -> tuple[int, bytes]:
    """The extension with these names (RFC 7301)."""
    listed = b"".join(bytes((len(name),)) + name for name in names)
    return 16, len(listed).to_bytes(2, "big") + listed


def offered(versions: list[int]) -> tuple[int, bytes]:
    """The extension with these versions (RFC 8446 4.2.1)."""
    return 43, bytes((2 * len(versions),)) + b"".join(each.to_bytes(2, "big") for each in versions)


Extensions = st.SearchStrategy[tuple[int, bytes]]


def listed(kind: int) -> Extensions:
    """A list of numbers: as it should be, empty, and too short."""
    return SOME.map(lambda some: numbers(kind, *some)) | st.sampled_from([(kind, b""), (kind, b"x")])


NAMED: Extensions = st.just(server_name(b"b.test"))
OFFERED: Extensions = (SOME | st.lists(st.sampled_from([0x0301, 0x0303, 0x0304, 0x0305, 0x7F1C, 0x2A2A]))).map(offered)
# What the details follow from, each once.
READ: Final = st.fixed_dictionaries(
    {0: NAMED},
    optional={
        10: listed(10),
        13: listed(13),
        11: st.tuples(st.just(11), st.binary(max_size=5)),
        16: PROTOCOLS.map(alpn),
        43: OFFERED,
        0xFE0D: st.tuples(st.just(0xFE0D), st.sampled_from([b"", b"\0", b"\0x", b"\1"])),
    },
).map(lambda found: list(found.values()))
OTHERS: Final = st.lists(
    st.tuples(ANY.filter(lambda kind: kind not in (0, 10, 11, 13, 16, 42, 43, 0xFE0D)), st.binary(max_size=3)), max_size=4
)
LEGACY: Final = st.sampled_from([0x0300, 0x0301, 0x0303, 0x0304, 0x03FF, 0x0302])


def check_details(message: bytes) -> bool:
    """Whether the details of a hello are compiled; they are those of the parser."""
    found = details_in_hello(message)
    if found is not None:
        assert found == details_of(message)
    elif name_in_opening(message) is not None:
        # A name of ALPN that is not plain text is left to the parser.
        assert any("\\" in name or '"' in name for name in facts_of("tls", "b.test", details_of(message))["tls_alpn"])
    return found is not None


@given(SOME, st.tuples(READ, OTHERS).flatmap(lambda some: st.permutations(some[0] + some[1])), LEGACY)
@settings(max_examples=EXAMPLES * 10, suppress_health_check=[HealthCheck.too_slow])
def test_compiled_details_are_the_parsers(ciphers: list[int], extensions: list[tuple[int, bytes]], version: int) -> None:
    message = made_hello(ciphers, extensions, version=version)
    assert name_in_opening(message) is not None
    check_details(message)


@pytest.mark.parametrize(
    ("ciphers", "extensions"),
    [
        ([], []),
        ([0x0A0A, 0x1A0A, 0x0A1A, 0x0B0B, 0xFAFA, 0x1301], []),
        (list(range(0x2000, 0x2000 + 120, 1)), [(0x3000 + number, b"") for number in range(100)]),
        ([1], [offered([0])]),
        ([1], [offered([])]),
        ([1], [offered([0x0A0A])]),
        ([1], [offered([0x0304, 0x0305, 0x7A7A, 0x0303])]),
        ([1], [(10, b""), (13, b"")]),
        ([1], [(10, b"x"), (13, b"x"), (11, b"")]),
        ([1], [(11, bytes(range(200, 256)))]),
        ([1], [numbers(13, 0x0A0A), (51, b""), (51, b"")]),
        ([1], [(0xFE0D, b"\0x")]),
        ([1], [(0xFE0D, b"\1x")]),
        ([1], [alpn([])]),
        *(([1], [alpn([name, b"h2"])]) for name in (b"", b"h", b"h2", b"-x", b"x-", b"/\x3a", b"~ ", b"z" * 255)),
    ],
)
def test_details_that_are_compiled(ciphers: list[int], extensions: list[tuple[int, bytes]]) -> None:
    assert check_details(made_hello(ciphers, [server_name(b"b.test"), *extensions]))
    assert check_details(made_hello(ciphers, [*extensions, server_name(b"b.test")]))


@pytest.mark.parametrize("name", [b"\xe9", b"a\xff", b'"', b"a\\b", b"\x7f", b"\x1f", b"\0"])
def test_details_that_are_left_to_the_parser(name: bytes) -> None:
    assert not check_details(made_hello([1], [server_name(b"b.test"), alpn([b"h2", name])]))


@given(
    st.lists(
        st.sampled_from(
            [server_name(b"b.test"), numbers(10, 23), numbers(13, 0x403), (11, b"\1\0"), alpn([b"h2"]), offered([0x0304])]
        )
        | st.tuples(st.sampled_from([0, 10, 11, 13, 16, 42, 43]), st.binary(max_size=5)),
        max_size=6,
    ),
    st.integers(0, 3),
)
def test_what_is_not_plain_has_no_compiled_details(extensions: list[tuple[int, bytes]], cut: int) -> None:
    """Without a name, with extensions twice, with lists that are cut; cut: bytes that are missing at the end."""
    message = made_hello([1], extensions)
    message = message[: len(message) - cut]
    if check_details(message):
        assert name_in_opening(message) == ("tls", "b.test")
        assert not cut


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
