"""The metrics: that each number of the status is in them, under names that Prometheus' own parser takes, with bounded labels."""

from __future__ import annotations

import dataclasses

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nfq_agent.cli import metrics
from nfq_agent.counters import INLINE_COUNTERS, PROXY_COUNTERS, TAP_COUNTERS, WORKER_COUNTERS
from nfq_agent.service.status import DecisionStatus, Status
from unit.test_status import REPORT

Samples = dict[str, list[tuple[dict[str, str], float]]]


def samples(reports: dict[str, Status | None]) -> Samples:
    found: Samples = {}
    for family in text_string_to_metric_families(metrics.text(reports)):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


@pytest.fixture(scope="module")
def of_one() -> Samples:
    return samples({"default": REPORT})


def test_an_agent_that_does_not_answer_is_a_value() -> None:
    found = samples({"default": REPORT, "web": None})
    assert found["nfq_agent_up"] == [({"agent": "default"}, 1), ({"agent": "web"}, 0)]
    assert [labels["agent"] for labels, _ in found["nfq_agent_build_info"]] == ["default"]


def test_every_counter_of_the_tables_is_there(of_one: Samples) -> None:
    counted = sum(len(values) for name, values in of_one.items() if not name.startswith("nfq_agent_process"))
    tables = len(WORKER_COUNTERS) + len(PROXY_COUNTERS) + len(TAP_COUNTERS) + len(INLINE_COUNTERS)
    assert counted > tables
    for name, labels in [
        ("queue_received_total", {"agent": "default", "queue": "main", "worker": "65535"}),
        ("verdicts_total", {"agent": "default", "queue": "main", "worker": "65535", "verdict": "drop"}),
        ("queue_flows", {"agent": "default", "queue": "main", "worker": "65535"}),
        ("proxy_bytes_forward_total", {"agent": "default", "proxy": "tcp"}),
        ("tap_lost_total", {"agent": "default", "tap": "pods"}),
        ("inline_uninspected_packets_total", {"agent": "default", "inline": "pods", "cause": "stale"}),
        ("bypass", {"agent": "default", "cause": "queue", "name": "main", "unit": "packets"}),
        (
            "rule_packets_total",
            {"agent": "default", "family": "inet6", "table": "mangle", "chain": "NFQA-default-OUTPUT", "rule": "app"},
        ),
    ]:
        assert (labels, 9_876_543_210) in of_one[f"nfq_agent_{name}"], name


def test_what_is_not_known_has_no_sample(of_one: Samples) -> None:
    assert "nfq_agent_queue_unsent_packets_total" not in of_one
    assert "nfq_agent_queue_waiting_packets" not in of_one


def test_decisions_are_by_the_name_of_the_rule(of_one: Samples) -> None:
    of_queue = [
        (labels["rule"], value) for labels, value in of_one["nfq_agent_policy_decisions_total"] if labels["kind"] == "queue"
    ]
    assert of_queue == [("stripe", 9_876_543_210), ("rule 2", 0), ("default", 7), ("midstream", 0)]


def test_rules_that_have_one_name_are_one_series() -> None:
    twice = tuple(DecisionStatus("allow", f"rule {number} (web)", number) for number in (1, 2))
    queue = dataclasses.replace(REPORT.queues[0], decisions=twice)
    found = samples({"default": dataclasses.replace(REPORT, queues=(queue,), taps=(), inlines=())})
    assert [(labels["rule"], value) for labels, value in found["nfq_agent_policy_decisions_total"]] == [("web", 3)]


def test_what_the_kernel_decided_has_the_same_labels() -> None:
    rules = (DecisionStatus("allow", "web", 3, 7), DecisionStatus("allow", "ssh", 2, 0))
    queue = dataclasses.replace(REPORT.queues[0], decisions=rules)
    found = samples({"default": dataclasses.replace(REPORT, queues=(queue,), taps=(), inlines=())})
    decided, in_kernel = (found[f"nfq_agent_policy_{name}_total"] for name in ("decisions", "kernel_packets"))
    assert [(labels["rule"], value) for labels, value in decided] == [("web", 3), ("ssh", 2)]
    assert in_kernel == [(decided[0][0], 7)]


def test_latency_is_a_histogram(of_one: Samples) -> None:
    name = "nfq_agent_verdict_latency_seconds"
    assert [(labels["le"], value) for labels, value in of_one[f"{name}_bucket"]] == [("1e-05", 3), ("0.001", 7), ("+Inf", 8)]
    assert [of_one[f"{name}_{part}"][0][1] for part in ("count", "sum")] == [8, 12.5]


def test_rules_of_one_name_are_one_series() -> None:
    found = samples({"default": dataclasses.replace(REPORT, rules=REPORT.rules * 1000)})
    assert [value for _, value in found["nfq_agent_rule_packets_total"]] == [9_876_543_210_000]


def test_no_label_takes_the_name_that_prometheus_gives_to_targets(of_one: Samples) -> None:
    for name, values in of_one.items():
        for labels, _ in values:
            assert not {"instance", "job"} & set(labels), name
