"""Elements beside those that follow flows: compiled, the chain says what it says in Python, packet by packet and line by line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import pytest
from flow_judges import POLICIES, conversations
from hypothesis import given, settings
from hypothesis import strategies as st

from nfq_agent.counters import Counters
from nfq_agent.element import PacketElement
from nfq_agent.element_chain import ElementChain
from nfq_agent.elements import packet_element
from nfq_agent.flow_steps import FlowSteps
from nfq_agent.service.packet_judge import PacketJudge, WorkerSettings
from nfq_agent.testing import tcp
from nfq_agent.verdict import ACCEPT, DROP, WOULD_DROP, Action, Verdict

Table = tuple[str, Mapping[str, Any]]
Line = tuple[str, str, dict[str, Any]]

BEHIND: list[Table] = [
    ("log", {"per_second": 0}), ("log", {"per_second": 2}), ("log", {"only": "drop"}), ("log", {"each": "flow"}),
    ("log", {"each": "flow", "only": "drop"}), ("log", {"each": "flow", "per_second": 1}), ("syn-monitor", {}),
    ("sample", {"one_in": 3}), ("sample", {"probability": 0.3, "seed": 2}), ("sample", {"one_in": 2, "per_flow": True}),
    ("chaos", {"drop": 0.1, "seed": 3}), ("chaos", {"drop": 0.1, "delay": 0.1, "seed": 4}),
]  # fmt: skip
LIMITS: list[Table] = [
    ("rate-limit", {"rate": "5/s"}), ("rate-limit", {"rate": "9/s", "per": "all"}), ("sample", {"one_in": 4, "rest": "accept"}),
    ("sample", {"probability": 0.7, "seed": 1, "rest": "drop"}),
]  # fmt: skip


def note(said: list[Line], kind: str, message: str, **fields: Any) -> None:
    """Keep a line."""
    said.append((kind, message, fields))


def judge_of(tables: Sequence[Table], monitor: bool = False) -> tuple[PacketJudge, list[Line]]:
    """A worker's judge of these elements, and what they say."""
    said: list[Line] = []
    elements: list[PacketElement] = []
    for kind, table in tables:
        cls = packet_element(kind)
        # When `dpi` says that the time of some other flow has passed depends on which packets it is shown.
        emit = (lambda *_, **__: None) if kind == "dpi" else partial(note, said, kind)
        elements.append(cls(kind, cls.Options.from_table(table), emit))
    settings = WorkerSettings(1, ACCEPT, DROP, monitor, drop_lines=None)
    return PacketJudge(
        ElementChain(elements, ACCEPT, monitor), settings, Counters(), lambda *_, **__: None, lambda *_: None
    ), said


def compare(tables: Sequence[Table], seed: int, talks: int = 25, tuples: int = 12, monitor: bool = False) -> tuple[int, int]:
    """Both ways on the same packets. Returns how many there were, and how many were shown in the compiled way."""
    (whole, expected), (quick, said) = judge_of(tables, monitor), judge_of(tables, monitor)
    steps = quick.settle_flows()
    assert isinstance(steps, FlowSteps)
    count = shown = 0
    for now, packet in conversations(seed, talks, tuples):
        whole.now = quick.now = now
        wanted = whole.verdict(packet)
        whole.tell(packet, wanted, 0)
        got, which = steps.judge(packet.payload, packet.length, now, now, packet.checksum_ready)
        count += 1
        if got is None:
            shown += 1
            got = quick.verdict(packet)
            quick.tell(packet, got, 0)
        elif which:
            quick.tell(packet, got, which)
        where = f"seed {seed}, packet {packet.id} {packet!r}: {got} instead of {wanted}"
        assert (got.action, got.rejects, got.delay) == (wanted.action, wanted.rejects, wanted.delay), where
        assert (got is WOULD_DROP) == (wanted is WOULD_DROP), where
        # A count of what was held back is written as soon as it is due.
        said.sort(key=itemgetter(0, 1))
        expected.sort(key=itemgetter(0, 1))
        assert [line[:2] for line in said] == [line[:2] for line in expected], where
        for line, other in zip(said, expected, strict=True):
            # Of what was not shown less may be known, and nothing else.
            assert line[2].items() <= other[2].items(), where
        said.clear()
        expected.clear()
    return count, shown


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(sorted(POLICIES)), st.lists(st.sampled_from(BEHIND), min_size=1, max_size=3), st.integers(0, 5), st.booleans()
)  # fmt: skip
def test_a_policy_with_others_behind_it_says_the_same(policy: str, behind: list[Table], seed: int, monitor: bool) -> None:
    if any(table.get("each") == "flow" for _, table in behind):
        # What changes each packet by itself, or chooses among them, is not compiled beside lines of flows.
        behind = [each for each in behind if each[0] not in ("chaos", "sample")]
    compare([("dpi", {}), ("policy", POLICIES[policy]), *behind], seed, monitor=monitor)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["allow-list", "block-list", "mixed"]), st.sampled_from(LIMITS),
    st.lists(st.sampled_from([each for each in BEHIND if each[1].get("each") != "flow"]), max_size=2), st.integers(0, 5),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_a_limit_in_front_says_the_same(  # one for each thing that differs
    policy: str, limit: Table, behind: list[Table], seed: int, first: bool, monitor: bool
) -> None:
    dpi: Table = ("dpi", {})
    front = [limit, dpi] if first else [dpi, limit]
    compare([*front, ("policy", POLICIES[policy]), *behind], seed, monitor=monitor)


def test_a_line_about_a_limited_packet_tells_nothing_of_an_earlier_request() -> None:
    limit: Table = ("rate-limit", {"rate": "5/s"})
    behind: list[Table] = [("sample", {"one_in": 3}), ("log", {"only": "drop"})]
    compare([limit, ("dpi", {}), ("policy", POLICIES["block-list"]), *behind], seed=124284, talks=10, tuples=60000)


def test_what_is_held_back_is_not_shown() -> None:
    # Lines beyond the rate cost no object; the same without a line at all.
    behind: dict[str, Table] = {
        "log": ("log", {"per_second": 1}), "drops": ("log", {"only": "drop"}), "flows": ("log", {"only": "drop", "each": "flow"}),
        "syn": ("syn-monitor", {}), "chaos": ("chaos", {"drop": 0.1, "seed": 1}),
    }  # fmt: skip
    shown = {
        name: compare([("dpi", {}), ("policy", POLICIES["allow-list"]), table], seed=3, talks=60, tuples=60000)
        for name, table in behind.items()
    }
    quiet = {name: 1 - few / count for name, (count, few) in shown.items()}
    assert min(quiet.values()) > 0.3, quiet
    assert quiet["log"] > 0.8 * quiet["syn"], quiet


@pytest.mark.parametrize(
    ("tables", "compiled"),
    [
        ([("dpi", {}), ("policy", {}), ("log", {})], True),
        ([("rate-limit", {"rate": "1/s"}), ("dpi", {}), ("policy", {})], True),
        ([("dpi", {}), ("rate-limit", {"rate": "1/s"}), ("policy", {})], True),
        # What stands behind one that may answer is not asked for each packet.
        ([("dpi", {}), ("policy", {}), ("rate-limit", {"rate": "1/s"})], False),
        ([("rate-limit", {"rate": "1/s"}), ("dpi", {}), ("rate-limit", {"rate": "1/s"}), ("policy", {})], False),
        ([("dpi", {}), ("policy", {}), *[("log", {})] * 5], False),
        ([("dpi", {}), ("policy", {}), ("sample", {"one_in": 2}), ("log", {"each": "flow"})], False),
        ([("rate-limit", {"rate": "1/s"}), ("dpi", {}), ("policy", {}), ("log", {"each": "flow"})], False),
    ],
)
def test_which_chains_are_compiled_beside_flows(tables: list[Table], compiled: bool) -> None:
    named = [(kind, POLICIES["left-open"] if kind == "policy" else table) for kind, table in tables]
    assert isinstance(judge_of(named)[0].settle_flows(), FlowSteps) is compiled


def test_a_flow_limited_from_its_first_packet_on_is_judged_when_it_gets_through() -> None:
    tables: list[Table] = [
        ("rate-limit", {"rate": "1/s", "burst": 1, "per": "all"}), ("dpi", {}), ("policy", POLICIES["allow-list"])
    ]  # fmt: skip
    judge, _ = judge_of(tables)
    steps = judge.settle_flows()
    assert isinstance(steps, FlowSteps)
    found: list[Verdict | None] = []
    for number in range(4):
        syn = tcp(f"192.0.2.1:{4000 + number % 2}", "198.51.100.1:80", flags="S", seq=9)
        found.append(steps.judge(syn.payload, syn.length, 1.0 + number // 3 * 5, 1000.0 + number // 3 * 5)[0])
    # The second flow was dropped, and is known; its packet has to be shown when it may pass.
    assert found == [ACCEPT, DROP, DROP, None]
    judge.now = 6.0
    assert judge.verdict(syn).action is Action.ACCEPT
    assert judge.flows is not None
    assert len(judge.flows) == 2
