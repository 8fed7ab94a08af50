"""What the running agent measures: rule hits, rates, drift of the rules, and packets that passed uninspected."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nfq_agent.service.live_rules import ListedRule
from nfq_agent.service.status import DriftStatus


class Meter:
    """Packets that the queue rules have matched since the start, by queue numbers, and packets a second by queue number.

    A rule's counter begins at zero when the rule is inserted again, so hits are added up from one reading to the next.
    """

    def __init__(self) -> None:
        self.since = time.time()
        self._last: dict[tuple[str, str, str], int] = {}
        self._total: dict[range, int] = {}
        self._received: Mapping[int, int] = {}
        self._rates: dict[int, float] = {}
        self._sampled = 0.0

    def read(self, found: Iterable[ListedRule]) -> None:
        """Take in one reading of all installed rules."""
        now: dict[tuple[str, str, str], int] = {}
        queues: dict[tuple[str, str, str], range] = {}
        key: tuple[str, str, str]
        for each in found:
            if numbers := each.installed.rule.queues:
                # Rules of the same text count together, unless the kernel tells them apart.
                rule = each.installed
                key = (each.family, each.table, f"handle {rule.handle}" if rule.handle else str(rule.rule))
                now[key] = now.get(key, 0) + each.installed.packets
                queues[key] = numbers
        for key, packets in now.items():
            last = self._last.get(key, 0)
            self._total[queues[key]] = self._total.get(queues[key], 0) + (packets - last if packets >= last else packets)
        self._last = now

    def start(self, found: Iterable[ListedRule]) -> None:
        """Begin at zero: rules that were already there have counted for an earlier agent."""
        self.read(found)
        self._total.clear()

    @property
    def memo(self) -> dict[str, Any]:
        """What another process needs to count on, as an object for JSON."""
        return {
            "since": self.since,
            "rules": [[*key, packets] for key, packets in self._last.items()],
            "hits": [[numbers.start, numbers.stop, packets] for numbers, packets in self._total.items()],
        }

    def resume(self, memo: Mapping[str, Any]) -> None:
        """Count on from what a process before this one noted. Raises ValueError, KeyError or TypeError if it cannot be read."""
        last = {(str(family), str(table), str(rule)): int(packets) for family, table, rule, packets in memo["rules"]}
        total = {range(int(start), int(stop)): int(packets) for start, stop, packets in memo["hits"]}
        self.since, self._last, self._total = float(memo["since"]), last, total

    def hits(self, numbers: range) -> int:
        """Packets that rules sent to these queue numbers."""
        return self._total.get(numbers, 0)

    def sample(self, now: float, received: Mapping[int, int]) -> None:
        """Take in how many packets each queue number has received by now."""
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
    """Counts repairs of the rules, and says when to check next: less often while another program keeps changing them."""

    def __init__(self, regular: float) -> None:
        """regular: seconds from one check to the next, 0 for never."""
        self.pause = regular
        self.repairs = 0
        self._regular = regular
        self._broken = False
        self._last: float | None = None

    def looked(self, repaired: bool, now: float, longest: float) -> None:
        """One check is done. now: seconds since the epoch. longest: the longest pause."""
        if not repaired:
            self.pause = self._regular
        elif self._broken:
            # Repaired at the last check too, and changed again since.
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

    @property
    def status(self) -> DriftStatus:
        """For the status."""
        return DriftStatus(self.repairs, self._last, self._regular, self.pause)


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
