"""Makes the status of the running agent from its workers, its rules and the kernel's figures."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Final

from nfq_agent.config.models import Config
from nfq_agent.counters import WORKER_COUNTERS, Slots
from nfq_agent.decisions import split
from nfq_agent.host.nfqueue.statistics import QueueStatistics
from nfq_agent.host.one_shot import OneShotError, one_shot
from nfq_agent.latency import NANOSECONDS
from nfq_agent.rules.foreign import InFront
from nfq_agent.rules.model import OFFLOAD_ACCEPTED, OFFLOAD_DENIED, OFFLOAD_NEW, tag_prefix
from nfq_agent.service import confinement
from nfq_agent.service.bypasses import bypasses
from nfq_agent.service.live_rules import ListedRule
from nfq_agent.service.meter import Meter, QueueReading
from nfq_agent.service.planned import not_compiled
from nfq_agent.service.queue_worker import QueueWorker
from nfq_agent.service.status import (
    DecisionStatus,
    DriftStatus,
    InForce,
    InlineStatus,
    InterfaceStatus,
    LatencyStatus,
    OffloadStatus,
    ProxyStatus,
    QueueStatus,
    RuleStatus,
    Status,
    TapStatus,
    WorkerStatus,
)
from nfq_agent.service.system import Workers
from nfq_agent.service.worker_counts import WorkerCounts

if TYPE_CHECKING:
    from nfq_agent.service.inlines import InlineWorker
    from nfq_agent.service.interface_worker import InterfaceWorker
    from nfq_agent.service.taps import TapWorker

_OFFLOADED: Final[Mapping[str, str]] = {OFFLOAD_NEW: "decided", OFFLOAD_ACCEPTED: "accepted", OFFLOAD_DENIED: "denied"}


def status(
    config: Config,
    crew: Workers,
    meter: Meter,
    backend: str,
    found: list[ListedRule],
    drift: DriftStatus,
    in_front: Iterable[InFront],
    lost: int,
) -> Status:
    """All of it. backend: name of the rule backend. found: the installed rules. lost: log lines that were not written."""
    proxy_status = proxies(crew)
    queue_status = tuple(
        replace(each, not_compiled=not_compiled(config, config.queue[each.name], backend))
        for each in with_kernel(config, queues(config, crew, meter), found)
    )
    return Status(
        instance=config.agent.instance,
        running=True,
        version=_version(),
        state="serving",
        pid=os.getpid(),
        since=meter.since,
        backend=backend,
        queues=queue_status,
        proxies=proxy_status,
        taps=taps(crew),
        inlines=inlines(crew),
        offloaded=offloaded(found),
        rules=rules(found),
        drift=drift,
        log_lines_lost=lost,
        bypasses=bypasses(queue_status, proxy_status, drift, in_front, meter),
        confinement=confinement.status(config),
    )


@cache
def _version() -> str:
    """That of this program. A process that ends reads it: `importlib.metadata` and all that it needs would stay, 2.3 MB."""
    if "importlib.metadata" not in sys.modules:
        try:
            return one_shot(_read_version)
        except (OneShotError, OSError):
            # No process can be made now, or it was killed.
            pass
    return _read_version()


def _read_version() -> str:
    from nfq_agent.version import version

    return version()


def with_kernel(config: Config, queues: Iterable[QueueStatus], found: Iterable[ListedRule]) -> tuple[QueueStatus, ...]:
    """The queues with what the kernel decided in front of them."""
    if all(queue.compile_mode == "off" for queue in config.queue.values()):
        return tuple(queues)
    from nfq_agent.rules.kernel_policy import names_of, reasons

    by_tag = reasons(config)
    total: dict[tuple[str, str, str], int] = dict.fromkeys(by_tag.values(), 0)
    for each in found:
        tag = each.installed.rule.tag.removeprefix(tag_prefix(config.agent.instance))
        counts = dict(each.installed.by_number)
        for name, packets in zip(names_of(tag, counts), counts.values() or (each.installed.packets,), strict=True):
            if reason := by_tag.get(name):
                total[reason] += packets
    made = []
    for queue in queues:
        left = {(element, label): packets for (name, element, label), packets in total.items() if name == queue.name}
        known = [replace(each, in_kernel=left.pop((each.element, each.rule), 0)) for each in queue.decisions]
        more = [DecisionStatus(element, label, 0, packets) for (element, label), packets in left.items()]
        made.append(replace(queue, decisions=(*known, *more)))
    return tuple(made)


def queues(config: Config, crew: Workers, meter: Meter) -> tuple[QueueStatus, ...]:
    """The queues, in the order of the configuration."""
    return tuple(_queue(name, config, crew, meter) for name in config.queue)


def _queue(name: str, config: Config, crew: Workers, meter: Meter) -> QueueStatus:
    queue = config.queue[name]
    workers = [worker for worker in crew.queues.values() if worker.name == name]
    readings = [_reading(worker) for worker in workers]
    known = [_known_reading(worker) for worker in workers if worker.known is not None]
    return QueueStatus(
        name=name,
        mode=queue.mode,
        bypass=queue.bypass,
        elements=queue.elements,
        in_force=_in_force(workers),
        kernel_dropped=_sum(reading.kernel_dropped for reading in (*readings, *known)),
        user_dropped=_sum(reading.user_dropped for reading in (*readings, *known)),
        uninspected=_sum((meter.uninspected(queue.numbers, readings), meter.uninspected(queue.known_numbers, known))),
        would_drop=sum(reading.counters["would_drop"] for reading in readings),
        workers=tuple(_worker(worker, reading, meter) for worker, reading in zip(workers, readings, strict=True)),
        decisions=_decisions(worker.figures for worker in workers),
        latency=_latency(worker.figures for worker in workers),
    )


def _decisions(counts: Iterable[WorkerCounts]) -> tuple[DecisionStatus, ...]:
    """The decisions of all workers, in the order of the chain."""
    total = _totals(counted.decisions for counted in counts)
    return tuple(DecisionStatus(*split(reason), count) for reason, count in total.items())


def _latency(counts: Iterable[WorkerCounts]) -> LatencyStatus:
    total = _totals(counted.latency for counted in counts)
    nanoseconds = total.pop(NANOSECONDS, 0)
    return LatencyStatus(total, nanoseconds / 1e9)


def _totals(counts: Iterable[Slots]) -> dict[str, int]:
    """The sum of each number, by its name."""
    total: dict[str, int] = {}
    for counted in counts:
        for name, count in counted.snapshot().items():
            total[name] = total.get(name, 0) + count
    return total


def unmarked(crew: Workers) -> dict[int, int]:
    """Packets that came back without the mark that an element gave them, by queue number."""
    return {number: worker.counters.unmarked for number, worker in crew.queues.items()}


def readings(crew: Workers, numbers: range) -> list[QueueReading]:
    """The figures of these queue numbers, as far as they are served."""
    known = ((worker.known.number, worker) for worker in crew.queues.values() if worker.known is not None)
    return [
        *(_reading(worker) for number, worker in crew.queues.items() if number in numbers),
        *(_known_reading(worker) for number, worker in known if number in numbers),
    ]


def proxies(crew: Workers) -> tuple[ProxyStatus, ...]:
    """The proxies."""
    return tuple(
        ProxyStatus(
            name=proxy.name,
            listen=tuple(str(endpoint) for endpoint in proxy.config.listen),
            elements=proxy.config.elements,
            pid=proxy.pid,
            restarts=proxy.restarts,
            memory=None if proxy.child is None else proxy.child.memory,
            counters=proxy.counted,
        )
        for proxy in crew.proxies.values()
    )


def taps(crew: Workers) -> tuple[TapStatus, ...]:
    """The taps."""
    if not crew.captures:
        return ()
    from nfq_agent.service.taps import TapWorker

    return tuple(_tap(worker) for worker in crew.captures.values() if isinstance(worker, TapWorker))


def inlines(crew: Workers) -> tuple[InlineStatus, ...]:
    """The inline links."""
    if not crew.captures:
        return ()
    from nfq_agent.service.inlines import InlineWorker

    return tuple(_inline(worker) for worker in crew.captures.values() if isinstance(worker, InlineWorker))


def _interfaces(worker: InterfaceWorker) -> tuple[InterfaceStatus, ...]:
    return tuple(InterfaceStatus(link.name, link.index, container, counts) for link, container, counts in worker.interfaces())


def _inline(worker: InlineWorker) -> InlineStatus:
    counters = worker.counters.snapshot()
    return InlineStatus(
        name=worker.name,
        mode=worker.settings.mode,
        elements=worker.settings.elements,
        pid=worker.pid,
        restarts=worker.restarts,
        memory=None if worker.child is None else worker.child.memory,
        lost=counters["enobufs"],
        hidden=worker.hidden,
        counters={**worker.total(), **{name: counters[name] for name in ("errors", "malformed", "flows", "flows_evicted")}},
        interfaces=_interfaces(worker),
        decisions=_decisions([worker.figures]),
    )


def _tap(worker: TapWorker) -> TapStatus:
    counters = worker.counters.snapshot()
    return TapStatus(
        name=worker.name,
        elements=worker.settings.elements,
        pid=worker.pid,
        restarts=worker.restarts,
        memory=None if worker.child is None else worker.child.memory,
        snap=worker.snap,
        counters={**worker.total(), **{name: counters[name] for name in ("errors", "malformed", "flows", "flows_evicted")}},
        interfaces=_interfaces(worker),
        decisions=_decisions([worker.figures]),
    )


def _reading(worker: QueueWorker) -> QueueReading:
    # The kernel's figures after the rule counters and before the worker's, so that packets that arrive in between do not count
    # as uninspected.
    line = worker.statistics()
    return _reading_of(line, worker.counters.snapshot())


def _known_reading(worker: QueueWorker) -> QueueReading:
    """The same of the queue of known flows."""
    line = None if worker.known is None else worker.known.statistics()
    counters = worker.counters.snapshot()
    own = {name: counters[f"known_{name}"] for name in ("last_id", "received", "lost")}
    return _reading_of(line, {**counters, **own, "known_received": 0, "known_lost": 0})


def _reading_of(line: QueueStatistics | None, counters: Mapping[str, int]) -> QueueReading:
    if line is None:
        return QueueReading(None, None, None, None, counters)
    return QueueReading(line.waiting, line.dropped, line.user_dropped, line.id_sequence, counters)


def _worker(worker: QueueWorker, reading: QueueReading, meter: Meter) -> WorkerStatus:
    return WorkerStatus(
        number=worker.number,
        pid=worker.pid,
        restarts=worker.restarts,
        memory=None if worker.child is None else worker.child.memory,
        per_second=meter.rate(worker.number),
        waiting=reading.waiting,
        counters={name: reading.counters[name] for name in WORKER_COUNTERS},
    )


def _in_force(workers: Iterable[QueueWorker]) -> InForce | None:
    """The settings that the kernel acknowledged; they are the same for all numbers of a queue."""
    for worker in workers:
        if worker.queue is not None:
            settings = worker.queue.settings
            known = None if worker.known is None else worker.known.queue
            room = 0 if known is None else known.settings.max_len
            return InForce(settings.copy, settings.copy_range, settings.max_len, settings.fail_open, settings.gso, room)
    return None


def _sum(values: Iterable[int | None]) -> int | None:
    known = list(values)
    return None if None in known else sum(value or 0 for value in known)


def rules(found: Iterable[ListedRule]) -> tuple[RuleStatus, ...]:
    """The installed rules."""
    return tuple(
        RuleStatus(each.family, each.table, str(each.installed.rule), each.installed.packets, each.installed.bytes)
        for each in found
    )


def offloaded(found: Iterable[ListedRule]) -> OffloadStatus:
    """The counters of the rules that keep verdicts on flows."""
    total = OffloadStatus()
    for each in found:
        if (key := _OFFLOADED.get(each.installed.rule.tag.rpartition(":")[2])) and not each.installed.rule.queues:
            total = replace(total, **{key: getattr(total, key) + each.installed.packets})
    return total


def serving(crew: Workers) -> str:
    """What the workers serve, as text."""
    parts = [f"queue {number}" for number in crew.queues]
    parts += [f"proxy {proxy.name} on {', '.join(map(str, proxy.config.listen))}" for proxy in crew.proxies.values()]
    parts += [capture.title for capture in crew.captures.values()]
    return ", ".join(parts) or "nothing (no queue and no proxy is configured)"
