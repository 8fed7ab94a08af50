"""What the running agent knows of itself: hits, rates, drift, and packets that passed uninspected; and the status made of it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from nfq_agent.config.models import Config
from nfq_agent.rules.model import OFFLOAD_ACCEPTED, OFFLOAD_DENIED, OFFLOAD_NEW
from nfq_agent.service.crew import Crew, QueueWorker
from nfq_agent.service.live_rules import Found

_OFFLOADED: Final = {OFFLOAD_NEW: "decided", OFFLOAD_ACCEPTED: "accepted", OFFLOAD_DENIED: "denied"}


class Meter:
    """Packets that the queue rules have matched since the start, by queue numbers, and packets a second by queue number.

    A rule's counter begins anew when the rule is put in again, so hits are added up from one reading to the next.
    """

    def __init__(self) -> None:
        self.since = time.time()
        self._last: dict[tuple[str, str, str], int] = {}
        self._total: dict[range, int] = {}
        self._received: Mapping[int, int] = {}
        self._rates: dict[int, float] = {}
        self._sampled = 0.0

    def read(self, found: Iterable[Found]) -> None:
        """Take in one reading of all installed rules."""
        now: dict[tuple[str, str, str], int] = {}
        queues: dict[tuple[str, str, str], range] = {}
        key: tuple[str, str, str]
        for each in found:
            if numbers := each.installed.rule.queues:
                # Rules of the same text count together.
                key = (each.family, each.table, str(each.installed.rule))
                now[key] = now.get(key, 0) + each.installed.packets
                queues[key] = numbers
        for key, packets in now.items():
            last = self._last.get(key, 0)
            self._total[queues[key]] = self._total.get(queues[key], 0) + (packets - last if packets >= last else packets)
        self._last = now

    def start(self, found: Iterable[Found]) -> None:
        """Begin at zero: rules that were there already counted for somebody else."""
        self.read(found)
        self._total.clear()

    def hits(self, numbers: range) -> int:
        """Packets that rules sent to these queue numbers."""
        return self._total.get(numbers, 0)

    def sample(self, now: float, received: Mapping[int, int]) -> None:
        """Take in how many packets each queue number has had by now."""
        elapsed = now - self._sampled
        self._rates = {number: max(0, count - self._received.get(number, count)) / elapsed for number, count in received.items()}
        self._received = received
        self._sampled = now

    def rate(self, number: int) -> float:
        """Packets a second over the last interval."""
        return self._rates.get(number, 0.0)

    @property
    def summary(self) -> str:
        """A few words for `systemctl status`."""
        return f"{sum(self._received.values())} packets judged, {sum(self._rates.values()):.0f} a second"


class Drift:
    """How often the rules had to be put right, and when to look again: less often while somebody fights over them."""

    def __init__(self, regular: float) -> None:
        """regular: seconds from one look to the next, 0 for never."""
        self.pause = regular
        self.repairs = 0
        self._regular = regular
        self._broken = False
        self._last: float | None = None

    def looked(self, repaired: bool, now: float, longest: float) -> None:
        """One look is done. now: seconds since the epoch. longest: the longest pause."""
        if not repaired:
            self.pause = self._regular
        elif self._broken:
            # Put right at the last look too, and broken again since.
            self.pause = min(self.pause * 2, max(longest, self._regular))
        self._broken = repaired
        if repaired:
            self.repairs += 1
            self._last = now

    def every(self, regular: float) -> Drift:
        """The same, with another interval."""
        new = Drift(regular)
        new.repairs, new._last = self.repairs, self._last
        return new

    def as_object(self) -> dict[str, Any]:
        """For the status."""
        return {"repairs": self.repairs, "last": self._last, "check": self._regular, "pause": self.pause}


@dataclass(frozen=True, slots=True)
class QueueReading:
    """One queue number's figures at one moment: the kernel's (None where it does not let us look) and the worker's."""

    waiting: int | None
    kernel_dropped: int | None
    user_dropped: int | None
    sequence: int | None
    counters: Mapping[str, int]


def uninspected(hits: int, readings: Iterable[QueueReading]) -> int | None:
    """Packets that passed without a verdict of ours: by fail-open, or by bypass while nobody was bound.

    Rule hits that never became a queue entry, less those that the kernel dropped because the queue was full; and entries
    that got a number but never reached the worker (its socket was full), less those dropped for it. None where the kernel's
    figures can't be read. The readings are not of one instant, so a small negative result is nothing. With `gso = false` a
    segmented packet is one hit and many entries, and the figure is a lower bound.
    Source: __nfqnl_enqueue_packet() in net/netfilter/nfnetlink_queue.c.
    """
    entered = dropped = unseen = 0
    for reading in readings:
        if reading.sequence is None or reading.kernel_dropped is None or reading.user_dropped is None:
            return None
        entered += reading.sequence
        dropped += reading.kernel_dropped
        counters = reading.counters
        unseen += max(0, counters["last_id"] - counters["received"] - counters["lost"] - reading.user_dropped)
    return max(0, hits - entered - dropped) + unseen


def of_workers(config: Config, crew: Crew, meter: Meter) -> dict[str, Any]:
    """The queues and proxies of the status."""
    queues = []
    for name, queue in config.queue.items():
        workers = [worker for worker in crew.queues.values() if worker.name == name]
        readings = [_reading(worker) for worker in workers]
        queues.append(
            {
                "name": name,
                "mode": queue.mode,
                "bypass": queue.bypass,
                "elements": list(queue.elements),
                "in_force": _in_force(workers),
                "kernel_dropped": _sum(reading.kernel_dropped for reading in readings),
                "user_dropped": _sum(reading.user_dropped for reading in readings),
                "uninspected": uninspected(meter.hits(queue.numbers), readings),
                "would_drop": sum(reading.counters["would_drop"] for reading in readings),
                "workers": [_worker(worker, reading, meter) for worker, reading in zip(workers, readings, strict=True)],
            }
        )
    proxies = [
        {
            "name": proxy.name,
            "listen": [str(endpoint) for endpoint in proxy.config.listen],
            "elements": list(proxy.config.elements),
            "pid": proxy.pid,
            "restarts": proxy.restarts,
            "memory": None if proxy.child is None else proxy.child.memory,
            "counters": proxy.counted,
        }
        for proxy in crew.proxies.values()
    ]
    return {"queues": queues, "proxies": proxies}


def _reading(worker: QueueWorker) -> QueueReading:
    # The kernel's figures after the rule counters and before the worker's, so that what moves on meanwhile is not taken for
    # packets that passed us.
    line = worker.statistics()
    counters = worker.counters.snapshot()
    if line is None:
        return QueueReading(None, None, None, None, counters)
    return QueueReading(line.waiting, line.dropped, line.user_dropped, line.id_sequence, counters)


def _worker(worker: QueueWorker, reading: QueueReading, meter: Meter) -> dict[str, Any]:
    return {
        "number": worker.number,
        "pid": worker.pid,
        "restarts": worker.restarts,
        "memory": None if worker.child is None else worker.child.memory,
        "per_second": meter.rate(worker.number),
        "waiting": reading.waiting,
        **{name: value for name, value in reading.counters.items() if name not in ("heartbeat", "last_id", "turns")},
    }


def _in_force(workers: Iterable[QueueWorker]) -> dict[str, Any] | None:
    """What the kernel acknowledged; it is the same for all numbers of a queue."""
    for worker in workers:
        if worker.queue is not None:
            settings = worker.queue.settings
            return {
                "copy": settings.copy,
                "copy_range": settings.copy_range,
                "max_len": settings.max_len,
                "fail_open": settings.fail_open,
                "gso": settings.gso,
            }
    return None


def _sum(values: Iterable[int | None]) -> int | None:
    known = list(values)
    return None if None in known else sum(value or 0 for value in known)


def of_rules(found: Iterable[Found]) -> dict[str, Any]:
    """The rules of the status, and what those of them count that keep verdicts on flows."""
    found = list(found)
    offloaded = dict.fromkeys(("decided", "accepted", "denied"), 0)
    for each in found:
        if (key := _OFFLOADED.get(each.installed.rule.tag.rpartition(":")[2])) and not each.installed.rule.queues:
            offloaded[key] += each.installed.packets
    return {
        "offloaded": offloaded,
        "rules": [
            {
                "family": each.family,
                "table": each.table,
                "rule": str(each.installed.rule),
                "packets": each.installed.packets,
                "bytes": each.installed.bytes,
            }
            for each in found
        ],
    }
