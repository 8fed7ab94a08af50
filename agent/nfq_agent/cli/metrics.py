"""The status of running agents as metrics for Prometheus, in its text format.

Names and units are those of https://prometheus.io/docs/practices/naming. Labels hold names from the configuration and of
interfaces, never addresses or names seen in traffic: traffic cannot make new series.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, Protocol

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from nfq_agent.counters import INLINE_COUNTERS, PROXY_COUNTERS, TAP_COUNTERS, VERDICT_COUNTERS, WORKER_COUNTERS
from nfq_agent.policy_rule import name_of
from nfq_agent.rules.model import Rule
from nfq_agent.service.status import (
    DecisionStatus,
    InlineStatus,
    LatencyStatus,
    ProxyStatus,
    QueueStatus,
    Status,
    TapStatus,
)

_PREFIX: Final = "nfq_agent_"
# Gauges; every other number in the tables of counters only rises while the agent runs.
_GAUGES: Final = frozenset({"flows", "active"})
_VERDICTS: Final = frozenset(VERDICT_COUNTERS.values())
# What the workers of taps and inline links count as those of queues do.
_OF_CAPTURES: Final = {name: WORKER_COUNTERS[name] for name in ("errors", "malformed", "flows", "flows_evicted")}
_PAST: Final = "past_"


class _Process(Protocol):
    """The attributes that the status of every kind of child process has."""

    @property
    def restarts(self) -> int: ...
    @property
    def memory(self) -> int | None: ...


class _Families(Collector):
    """Families of metrics in the order of their first use. The labels of a family are those of its first use."""

    def __init__(self) -> None:
        self._made: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        self._histograms: dict[str, HistogramMetricFamily] = {}

    def collect(self) -> Iterator[Metric]:
        yield from self._made.values()
        yield from self._histograms.values()

    def count(self, name: str, meaning: str, value: int | None, /, **labels: str) -> None:
        """A number that only rises. None, for not known, makes no sample."""
        self._sample(CounterMetricFamily, name, meaning, value, labels)

    def gauge(self, name: str, meaning: str, value: float | None, /, **labels: str) -> None:
        """A number that rises and falls. None, for not known, makes no sample."""
        self._sample(GaugeMetricFamily, name, meaning, value, labels)

    def histogram(self, name: str, meaning: str, latency: LatencyStatus, /, **labels: str) -> None:
        """A histogram: times by their upper bounds."""
        text = meaning[:1].upper() + meaning[1:] + "."
        made = self._histograms.setdefault(name, HistogramMetricFamily(f"{_PREFIX}{name}", text, labels=list(labels)))
        so_far = itertools.accumulate(latency.buckets.values())
        buckets = [(bound, float(count)) for bound, count in zip(latency.buckets, so_far, strict=True)]
        made.add_metric(list(labels.values()), buckets, latency.total)

    def table(self, about: str, meanings: Mapping[str, str], counters: Mapping[str, int], **labels: str) -> None:
        """The counters of one table, each a family of its own."""
        for name, meaning in meanings.items():
            if name in _GAUGES:
                self.gauge(f"{about}_{name}", meaning, counters.get(name), **labels)
            else:
                self.count(f"{about}_{name}", meaning, counters.get(name), **labels)

    def process(self, process: _Process, /, **labels: str) -> None:
        """A child process of the agent."""
        self.count("process_restarts", "times that a process of the agent was started again", process.restarts, **labels)
        self.gauge("process_memory_bytes", "memory of a process of the agent", process.memory, **labels)

    def _sample(
        self,
        kind: Callable[..., CounterMetricFamily | GaugeMetricFamily],
        name: str,
        meaning: str,
        value: float | None,
        labels: Mapping[str, str],
    ) -> None:
        if name not in self._made:
            text = meaning[:1].upper() + meaning[1:] + "."
            self._made[name] = kind(f"{_PREFIX}{name}", text, labels=list(labels))
        if value is not None:
            self._made[name].add_metric(list(labels.values()), value)


def text(reports: Mapping[str, Status | None]) -> str:
    """The metrics of instances by name, in the text format; None stands for an instance without an agent that answers."""
    return generate_latest(_collected(reports)).decode()


def families(reports: Mapping[str, Status | None]) -> Iterator[Metric]:
    """The same, for a registry of prometheus_client."""
    return _collected(reports).collect()


def _collected(reports: Mapping[str, Status | None]) -> _Families:
    made = _Families()
    for instance, report in reports.items():
        made.gauge("up", "1 where the agent answers, else 0", int(report is not None), agent=instance)
    for report in reports.values():
        if report is not None:
            _agent(made, report)
    return made


def _agent(families: _Families, report: Status) -> None:
    instance = report.instance
    families.gauge(
        "build_info", "1, with the version that runs", 1, agent=instance, version=report.version, backend=report.backend
    )
    families.gauge(
        "start_time_seconds", "when the agent began to serve, in seconds since the epoch", report.since, agent=instance
    )
    for queue in report.queues:
        _queue(families, instance, queue)
    for proxy in report.proxies:
        _proxy(families, instance, proxy)
    for tap in report.taps:
        _tap(families, instance, tap)
    for inline in report.inlines:
        _inline(families, instance, inline)
    _rules(families, report)
    offloaded = report.offloaded
    for verdict, packets in (("accept", offloaded.accepted), ("drop", offloaded.denied)):
        families.count(
            "offloaded_packets", "packets that the kernel answered by their flow", packets, agent=instance, verdict=verdict
        )
    families.count("rule_repairs", "repairs of the rules", report.drift.repairs, agent=instance)
    wrong = None if report.drift.unreadable else len(report.drift.wrong)
    families.gauge("rules_wrong", "rules or chains in the kernel that are not as configured", wrong, agent=instance)
    for each in report.bypasses:
        labels = {"agent": instance, "cause": each.cause, "name": each.name, "unit": each.unit}
        families.gauge(
            "bypass", "what passed without a verdict since the start, by cause; its unit is a label", each.count, **labels
        )
    families.count("lost_log_lines", "log lines that could not be written", report.log_lines_lost, agent=instance)


def _queue(families: _Families, instance: str, queue: QueueStatus) -> None:
    at = {"agent": instance, "queue": queue.name}
    families.count("uninspected_packets", "packets that passed without a verdict of ours", queue.uninspected, **at)
    dropped = "packets that the kernel dropped because the queue was full"
    families.count("queue_overrun_packets", dropped, queue.kernel_dropped, **at)
    dropped = "packets that the kernel dropped because the worker's socket was full"
    families.count("queue_unsent_packets", dropped, queue.user_dropped, **at)
    _decisions(families, instance, "queue", queue.name, queue.decisions)
    if queue.latency is not None:
        took = "time from when a worker took the first packet of a turn until its verdict was sent, one sample a turn"
        families.histogram("verdict_latency_seconds", took, queue.latency, **at)
    for worker in queue.workers:
        labels = {**at, "worker": str(worker.number)}
        families.gauge("queue_waiting_packets", "packets that wait for a verdict", worker.waiting, **labels)
        for action, name in VERDICT_COUNTERS.items():
            families.count("verdicts", "verdicts given", worker.counters.get(name), **labels, verdict=action.name.lower())
        others = {name: meaning for name, meaning in WORKER_COUNTERS.items() if name not in _VERDICTS}
        families.table("queue", others, worker.counters, **labels)
        families.process(worker, agent=instance, kind="queue", name=queue.name, number=str(worker.number))


def _proxy(families: _Families, instance: str, proxy: ProxyStatus) -> None:
    families.table("proxy", PROXY_COUNTERS, proxy.counters, agent=instance, proxy=proxy.name)
    families.process(proxy, agent=instance, kind="proxy", name=proxy.name, number="0")


def _tap(families: _Families, instance: str, tap: TapStatus) -> None:
    families.table("tap", {**TAP_COUNTERS, **_OF_CAPTURES}, tap.counters, agent=instance, tap=tap.name)
    _decisions(families, instance, "tap", tap.name, tap.decisions)
    families.process(tap, agent=instance, kind="tap", name=tap.name, number="0")


def _inline(families: _Families, instance: str, inline: InlineStatus) -> None:
    at = {"agent": instance, "inline": inline.name}
    _decisions(families, instance, "inline", inline.name, inline.decisions)
    judged = {name: meaning for name, meaning in INLINE_COUNTERS.items() if not name.startswith(_PAST)}
    families.table("inline", {**judged, **_OF_CAPTURES}, inline.counters, **at)
    for name in INLINE_COUNTERS:
        if name.startswith(_PAST):
            passed = "packets that passed without a verdict of ours"
            families.count("inline_uninspected_packets", passed, inline.counters.get(name), **at, cause=name.removeprefix(_PAST))
    families.count("inline_unsent_packets", "frames that could not be sent on", inline.lost, **at)
    families.gauge("inline_hidden_interfaces", "interfaces with a foreign program before ours", inline.hidden, **at)
    families.process(inline, agent=instance, kind="inline", name=inline.name, number="0")


def _decisions(families: _Families, instance: str, kind: str, name: str, decisions: Iterable[DecisionStatus]) -> None:
    """By the name of the rule, so that a rule that moves keeps its series; rules of one name are one series."""
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    for each in decisions:
        key = each.element, name_of(each.rule)
        count, packets = counts.get(key, (0, 0))
        counts[key] = count + each.count, packets + each.in_kernel
    for (element, rule), (count, packets) in counts.items():
        labels = {"agent": instance, "kind": kind, "name": name, "element": element, "rule": rule}
        families.count("policy_decisions", "decisions of a policy, by its rule", count, **labels)
        if packets:
            families.count("policy_kernel_packets", "packets decided in front of the queue, by the rule", packets, **labels)


def _rules(families: _Families, report: Status) -> None:
    """Hits by the name of the rule: a rule of the configuration may be many in the kernel."""
    hits: dict[tuple[str, str, str, str], tuple[int, int]] = {}
    for rule in report.rules:
        parsed = Rule.parse(rule.rule)
        key = (rule.family, rule.table, parsed.chain, parsed.tag.rpartition(":")[2])
        packets, size = hits.get(key, (0, 0))
        hits[key] = packets + rule.packets, size + rule.bytes
    for (family, table, chain, name), (packets, size) in hits.items():
        labels = {"agent": report.instance, "family": family, "table": table, "chain": chain, "rule": name}
        families.count("rule_packets", "packets that matched a rule, since it was put in", packets, **labels)
        families.count("rule_bytes", "bytes of packets that matched a rule, since it was put in", size, **labels)
