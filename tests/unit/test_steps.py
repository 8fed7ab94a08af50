"""Elements in their compiled form say what they say in Python, packet by packet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nfq_agent.address_tokens import AddressTokens
from nfq_agent.element import PacketElement
from nfq_agent.element_chain import ElementChain
from nfq_agent.elements import packet_element
from nfq_agent.elements.log import FiveTupleLog, LogOptions
from nfq_agent.packet import Packet, PacketError
from nfq_agent.rate import Bucket, Buckets, Suppressed
from nfq_agent.steps import LineLimit
from nfq_agent.testing import icmp, tcp, udp
from nfq_agent.verdict import ACCEPT, DROP, WOULD_DROP, Action, Verdict

Table = tuple[str, Mapping[str, Any]]

SAMPLES: list[Mapping[str, Any]] = [
    {"one_in": 3},
    {"one_in": 2, "rest": "drop"},
    {"probability": 0.4, "seed": 7, "rest": "accept"},
    {"probability": 0.5, "seed": 3},
    {"probability": 0.5, "per_flow": True, "seed": 2},
    {"one_in": 2, "per_flow": True, "rest": "drop"},
]
LIMITS: list[Mapping[str, Any]] = [
    {"rate": "2/s", "burst": 1},
    {"rate": "3/s", "per": "destination", "prefix": 24, "prefix6": 64},
    {"rate": "4/s", "per": "all"},
    {"rate": "1/m", "memory": 2},
    {"rate": "1/s", "prefix": 0, "prefix6": 127},
]
LOGS: list[Mapping[str, Any]] = [
    {"per_second": 2}, {"per_second": 0}, {"per_second": 1, "burst": 5, "only": "drop"}, {"per_second": 3, "only": "all"},
]  # fmt: skip
MONITORS: list[Mapping[str, Any]] = [{}, {"per_source": "2/s"}, {"memory": 1}]
BROKEN: list[Mapping[str, Any]] = [
    {"drop": 0.4, "seed": 1}, {"drop": 0.2, "delay": 0.2, "delay_for": "1s", "jitter": "10ms", "seed": 5},
    {"corrupt": 0.3, "duplicate": 0.3, "seed": 4}, {"drop": 1.0, "seed": 0},
]  # fmt: skip
ELEMENTS = st.one_of(
    *(st.tuples(st.just(kind), st.sampled_from(tables)) for kind, tables in (
        ("sample", SAMPLES), ("rate-limit", LIMITS), ("log", LOGS), ("syn-monitor", MONITORS), ("chaos", BROKEN)
    ))
)  # fmt: skip

A, B, C = "192.0.2.1", "192.0.2.2", "198.51.100.3"
A6, B6 = "2001:db8::1", "2001:db8::1:2"


def _packets() -> list[bytes]:
    whole = [
        udp(f"{A}:1", f"{B}:2", b"data"), udp(f"{B}:2", f"{A}:1"), udp(f"{C}:5", f"{A}:1"), icmp(A, B), icmp(A6, B6),
        tcp(f"{A}:1", f"{B}:2", flags="S"), tcp(f"{A}:1", f"{B}:2", flags="SA"), tcp(f"{A}:1", f"{C}:2", flags="SEC", seq=9),
        tcp(f"[{A6}]:1", f"[{B6}]:2", flags="S"), udp(f"[{B6}]:1", f"[{A6}]:2"), tcp(f"{B}:9", f"{C}:2", b"x"),
    ]  # fmt: skip
    packets = [packet.payload for packet in whole]
    tcp_syn = packets[5]
    return [
        *packets, b"", b"\x45", tcp_syn[:30], tcp_syn[:23], packets[0][:22], packets[0][:26], packets[8][:50],
        # A fragment, options, another protocol, a TCP header that is too short, lengths of 0 and below the header.
        tcp_syn[:6] + b"\x20\0" + tcp_syn[8:], b"\x46" + tcp_syn[1:], tcp_syn[:9] + b"\x2f" + tcp_syn[10:],
        tcp_syn[:32] + b"\x10" + tcp_syn[33:], tcp_syn[:2] + b"\0\0" + tcp_syn[4:], tcp_syn[:2] + b"\0\x10" + tcp_syn[4:],
        packets[8][:4] + b"\0\0" + packets[8][6:], packets[8][:6] + b"\0" + packets[8][7:],
    ]  # fmt: skip


PACKETS = _packets()


Said = list[list[tuple[str, dict[str, Any]]]]


def chain_of(tables: Sequence[Table], monitor: bool) -> tuple[ElementChain, Said]:
    """The chain, and what each of its elements says."""
    elements: list[PacketElement] = []
    said: Said = []
    for kind, table in tables:
        cls = packet_element(kind)
        lines: list[tuple[str, dict[str, Any]]] = []
        elements.append(
            cls(kind, cls.Options.from_table(table), lambda message, lines=lines, **fields: lines.append((message, fields)))
        )
        said.append(lines)
    return ElementChain(elements, ACCEPT, monitor), said


def in_python(chain: ElementChain, packet: Packet, monitor: bool) -> Verdict:
    """As the worker does with a packet that is shown."""
    try:
        verdict = chain.decide(packet, None)
    except PacketError:
        # on_error
        verdict = DROP
    if monitor and verdict.action is Action.DROP:
        verdict = WOULD_DROP
    chain.judged(packet, verdict)
    return verdict


@settings(max_examples=150, deadline=None)
@given(
    st.lists(ELEMENTS, min_size=1, max_size=4),
    st.lists(st.tuples(st.sampled_from(PACKETS), st.sampled_from([0.0, 0.1, 0.6, 11.0, -0.5, -2.0])), max_size=60),
    st.booleans(),
    st.booleans(),
)
def test_a_compiled_chain_says_what_the_elements_say(
    tables: list[Table], packets: list[tuple[bytes, float]], monitor: bool, logged: bool
) -> None:
    """logged: no element logs its drops itself, so each drop is to be shown; those that cannot show them are left out."""
    if logged:
        tables = [each for each in tables if each[0] != "rate-limit" and each[1].get("rest") != "drop"]
        assume(tables)
    reference, expected = chain_of(tables, monitor)
    chain, said = chain_of(tables, monitor)
    compiled = chain.compiled(monitor, set() if logged else None)
    assert compiled is not None
    now = 1000.0
    for number, (payload, later) in enumerate(packets):
        now += later
        verdict = in_python(reference, Packet(payload, id=number, time=now), monitor)
        packet = Packet(payload, id=number, time=now)
        answer, which = compiled.steps.look_up(payload, now)
        assert answer is None or not logged or answer is ACCEPT
        if answer is None:
            answer = in_python(chain, packet, monitor)
        elif which:
            compiled.tell(packet, None, answer, which)
        assert answer == verdict
        assert (answer is WOULD_DROP) == (verdict is WOULD_DROP)
        assert said == expected
    for each in (reference, chain):
        each.stop()
    assert said == expected


@settings(max_examples=100, deadline=None)
@given(
    st.floats(0.1, 50),
    st.integers(1, 9),
    st.integers(1, 6),
    st.lists(st.tuples(st.binary(max_size=1), st.sampled_from([0.0, 0.01, 0.3, 5.0, -0.5, -3.0])), max_size=200),
)
def test_buckets_by_address_are_those_of_rate(
    per_second: float, burst: int, limit: int, taken: list[tuple[bytes, float]]
) -> None:
    reference, tokens = Buckets(per_second, burst, limit), AddressTokens(per_second, burst, limit)
    now = 1e9
    for key, later in taken:
        now += later
        assert tokens.take_from(key, now) is reference.take(key, now)
        assert (len(tokens), tokens.evicted) == (len(reference), reference.evicted)


def test_many_addresses_have_each_a_bucket() -> None:
    tokens = AddressTokens(1.0, 2, 5000)
    addresses = [number.to_bytes(16, "big") for number in range(6000)]
    assert all(tokens.take_from(address, 1.0) for address in addresses)
    assert (len(tokens), tokens.evicted) == (5000, 1000)
    assert all(tokens.take_from(address, 1.0) for address in addresses[1000:])
    assert not any(tokens.take_from(address, 1.0) for address in addresses[1000:])
    assert tokens.take_from(addresses[0], 1.0)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 5), st.integers(1, 5), st.lists(st.sampled_from([0.0, 0.2, 4.0, 11.0, -0.5, -4.0]), max_size=80))
def test_the_limit_of_lines_is_that_of_rate(per_second: int, burst: int, times: list[float]) -> None:
    said: list[int] = []
    limit = LineLimit(per_second, burst, drops_only=False, say=said.append)
    bucket, suppressed, expected = Bucket(per_second, burst, 0.0), Suppressed(), []
    now = 1e9
    for later in times:
        now += later
        takes = per_second == 0 or bucket.take(now)
        if not takes:
            suppressed.add(now)
        if count := suppressed.due(now):
            expected.append(count)
        assert limit.take(now) is takes
        assert said == expected
    assert limit.take_held() == suppressed.take()
    assert limit.take_held() == 0


class Loud(FiveTupleLog):
    """Something else than `log`: its compiled form is not what it does."""

    def judged(self, *_: Any) -> None:
        self.emit("loud")


@pytest.mark.parametrize(
    ("tables", "own_lines", "compiles"),
    [
        ([("log", {})], None, True),
        ([("log", {"each": "flow"})], None, False),
        ([("rate-limit", {"rate": "1/s"}), ("log", {}), ("sample", {"one_in": 2}), ("syn-monitor", {})], None, True),
        ([("log", {})] * 5, None, False),
        ([("log", {}), ("chaos", {"drop": 0.5})], None, True),
        # `chaos` knows beforehand which packet it would drop.
        ([("chaos", {"drop": 0.5})], {"log"}, True),
        ([("chaos", {"drop": 0.5}), ("rate-limit", {"rate": "1/s"})], {"log"}, False),
        # A drop without a line of its element has to be shown, so that the worker logs it.
        ([("sample", {"one_in": 2, "rest": "drop"})], {"log"}, False),
        ([("sample", {"one_in": 2, "rest": "accept"})], {"log"}, True),
        ([("rate-limit", {"rate": "1/s"})], {"rate-limit"}, True),
        ([("rate-limit", {"rate": "1/s"})], {"log"}, False),
        ([("loud", {})], None, False),
    ],
)
def test_which_chains_are_compiled(tables: list[Table], own_lines: set[str] | None, compiles: bool) -> None:
    if tables[0][0] == "loud":
        loud = Loud("loud", LogOptions(), lambda *_, **__: None)
        chain = ElementChain([loud], ACCEPT)
    else:
        chain = chain_of(tables, monitor=False)[0]
    assert (chain.compiled(False, own_lines) is not None) is compiles
    assert chain_of([("log", {})], monitor=False)[0].compiled(False, None) is not None
    default = ElementChain([packet_element("log")("log", packet_element("log").Options.from_table({}), print)], DROP)
    assert default.compiled(False, None) is None
