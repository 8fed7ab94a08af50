"""What a worker counts: decisions by rule, latency, and that an agent or a reload that comes after continues the numbers."""

from __future__ import annotations

import os
from typing import Any

import pytest

from nfq_agent.config.models import ElementSpec
from nfq_agent.context import Context
from nfq_agent.counters import Counters
from nfq_agent.decisions import MOST, OTHERS, Decisions, split
from nfq_agent.elements.dpi import Dpi, DpiOptions
from nfq_agent.elements.policy import Policy
from nfq_agent.flow import Flow
from nfq_agent.foresight import Foresight
from nfq_agent.host.memory import SharedNumbers
from nfq_agent.latency import BOUNDS, NANOSECONDS, Latency
from nfq_agent.packet import FiveTuple
from nfq_agent.service.worker_counts import DECISIONS, LATENCY, FormerCounts, LastingCounts, WorkerCounts
from nfq_agent.testing import tcp
from nfq_agent.verdict import ACCEPT


def spec(rules: list[dict[str, Any]]) -> ElementSpec:
    return ElementSpec("allow", Policy, Policy.Options.from_table({"default": "drop", "rule": rules}))


WEB = {"action": "accept", "name": "web", "dport": 443}
SSH = {"action": "accept", "dport": 22}


def test_the_tables_do_not_overlap_in_the_memory() -> None:
    assert len(Counters().names) * 8 <= LATENCY
    assert LATENCY + 8 * len(Latency().names) <= DECISIONS
    memory = SharedNumbers()
    assert len(memory.numbers) >= DECISIONS + 8 * MOST
    counted = WorkerCounts([spec([WEB])], memory.numbers)
    counted.counters.received = 3
    counted.latency.observe(0.5)
    counted.decisions.count("allow", "default")
    assert sum(1 for number in memory.numbers.cast("Q") if number) == 4


def test_a_policy_counts_what_decides() -> None:
    counted = WorkerCounts([spec([WEB, SSH])])
    policy = Policy("allow", spec([WEB, SSH]).options, lambda *_, **__: None)
    policy.context = Context(decisions=counted.decisions)
    for port in (443, 22, 443, 80):
        policy.decide(tcp("10.0.0.1:9", f"10.0.0.2:{port}"), None)
    found = {split(name)[1]: count for name, count in counted.decisions.snapshot().items() if count}
    assert found == {"rule 1 (web)": 2, "rule 2": 1, "default": 1}


def test_a_flow_is_one_decision_and_a_conflict_has_one_name() -> None:
    rules: list[dict[str, Any]] = [{"action": "accept", "tls_sni": "a.example"}]
    counted = WorkerCounts([spec(rules)])
    policy = Policy("allow", spec(rules).options, lambda *_, **__: None)
    policy.context = Context(decisions=counted.decisions)
    packet = tcp("10.0.0.1:9", "10.0.0.2:443", b"hello")
    for facts in ({"dpi": "decided", "tls_sni": "a.example"}, {"dpi": "decided", "conflict": "two names"}):
        flow = Flow(packet.headers.five_tuple, 1.0, 1.0)
        flow.facts |= facts
        for _ in range(3):
            policy.decide(packet, flow)
    found = {split(name)[1]: count for name, count in counted.decisions.snapshot().items() if count}
    assert found == {"rule 1": 1, "conflict": 1}


def test_rules_beyond_the_limit_are_counted_together() -> None:
    decisions = Decisions(("allow", f"rule {number}") for number in range(2 * MOST))
    assert len(decisions.names) == MOST
    for number in range(2 * MOST):
        decisions.count("allow", f"rule {number}")
    assert decisions.snapshot()[OTHERS] == MOST + 1
    assert split(OTHERS) == ("", OTHERS)


def test_what_is_not_named_is_not_counted() -> None:
    decisions = Decisions([("allow", "default")])
    decisions.count("allow", "elsewhere")
    assert decisions.snapshot() == {"allow: default": 0}


@pytest.mark.parametrize(("seconds", "bucket"), [(0.0, "1e-05"), (1e-5, "1e-05"), (1.1e-5, "2.5e-05"), (0.3, "1"), (9.0, "+Inf")])
def test_a_sample_is_in_the_first_bucket_that_holds_it(seconds: float, bucket: str) -> None:
    latency = Latency()
    latency.observe(seconds)
    found = latency.snapshot()
    assert found.pop(NANOSECONDS) == int(seconds * 1e9)
    assert {name for name, count in found.items() if count} == {bucket}
    assert len(found) == len(BOUNDS) + 1


def test_another_layout_continues_the_numbers_of_the_same_names() -> None:
    before = WorkerCounts([spec([WEB, SSH])])
    before.counters.received = 5
    before.latency.observe(0.5)
    for label in ("rule 1 (web)", "rule 2", "rule 2"):
        before.decisions.count("allow", label)
    after = WorkerCounts([spec([WEB])])
    assert not after.fits(before.noted)
    assert WorkerCounts([spec([WEB, SSH])]).fits(before.noted)
    after.continue_from(before)
    assert after.counters.received == 5
    assert {name: count for name, count in after.decisions.snapshot().items() if count} == {"allow: rule 1 (web)": 1}


def test_an_agent_that_counted_no_decisions_is_continued() -> None:
    memory = SharedNumbers()
    Counters(memory.numbers).accepted = 9
    after = WorkerCounts([spec([WEB])])
    after.continue_from(FormerCounts({"counters": Counters().names}, memory.numbers))
    assert after.counters.accepted == 9


def test_counts_outlive_the_agent_and_a_reload() -> None:
    first = LastingCounts([spec([WEB, SSH])])
    first.counters.received = 5
    first.decisions.count("allow", "rule 1 (web)")
    same = LastingCounts([spec([WEB, SSH])]).inherited(os.dup(first.fileno()), first.noted)
    first.counters.received = 6
    assert same.counters.received == 6
    other = LastingCounts([spec([WEB])]).inherited(os.dup(first.fileno()), first.noted)
    assert other.counters.received == 0
    other.count_on()
    assert (other.counters.received, other.decisions.snapshot()["allow: rule 1 (web)"]) == (6, 1)
    assert LastingCounts([spec([WEB, SSH])]).after(first) is first
    assert LastingCounts([spec([WEB])]).after(first).counters.received == 6


def test_the_five_tuple_of_an_opening_counts_where_the_chain_is_not_asked() -> None:
    """As the compiled openings count: by the place that `Foresight.answer` gives."""
    rules: list[dict[str, Any]] = [{"action": "accept", "name": "a", "tls_sni": "a.example"}]
    counted = WorkerCounts([spec(rules)])
    policy = Policy("allow", spec(rules).options, lambda *_, **__: None)
    dpi = Dpi("dpi", DpiOptions(), lambda *_, **__: None)
    foresight = Foresight([dpi, policy], ACCEPT, None, ACCEPT, decisions=counted.decisions)
    assert foresight.possible
    found = foresight.answer("tls", FiveTuple(6, b"\x0a\0\0\1", 9, b"\x0a\0\0\2", 443), "a.example")
    assert found is not None
    assert found[1] == [counted.decisions.place("allow: rule 1 (a)")]
