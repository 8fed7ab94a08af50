"""Divides the flows that the agent reports into periods, each of which becomes one report. No I/O, no clock.

The agent tells totals of a flow since its first packet; a report says what has passed since the report before. A period ends when
the flow is silent, when it lasts too long, and when the flow ends: the timeouts of IPFIX (RFC 5470, section 5.1).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from nfq_agent.flow import Account
from nfq_agent.flow_filter import FilterPart
from nfq_agent.flow_report import FIGURES, FLOW_KEY, FlowReport, PeriodEnd, check

# Flows of which something is to be reported, and totals of flows of which all is.
MOST: Final = 65536
_MOST_QUIET: Final = 262144
_NOTHING: Final = Account(0, 0, 0, 0, 0.0)
_Key = tuple[Any, ...]


@dataclass(slots=True)
class _Period:
    """first: of the flow. start: of the period. at: when it changed. Seconds of the agent's monotonic clock."""

    first: float
    start: float
    at: float
    before: Account
    total: Account
    record: dict[str, Any]


class FlowPeriods:
    """began: monotonic seconds; of a flow that is older, what had passed is not reported. active, idle: the timeouts in seconds.

    epoch: what is added to monotonic seconds to have seconds since the epoch; set by the caller. missed: flows whose figures are
    not known.
    """

    def __init__(self, what: FilterPart, began: float, active: float, idle: float, most: int = MOST) -> None:
        self._what = what
        self._floor = began
        self._active, self._idle, self._most = active, idle, most
        self._open: OrderedDict[_Key, _Period] = OrderedDict()
        # First packet and what was reported, of flows that are silent.
        self._quiet: OrderedDict[_Key, tuple[float, Account]] = OrderedDict()
        self.epoch = 0.0
        self.missed = 0

    def add(self, instance: str, records: Iterable[dict[str, Any]], now: float) -> Iterator[FlowReport]:
        """Take in the agent's records. now: monotonic seconds."""
        for record in records:
            try:
                yield from self._add(instance, record, now)
            except (KeyError, TypeError, ValueError):
                self.missed += 1

    def _add(self, instance: str, record: dict[str, Any], now: float) -> Iterator[FlowReport]:
        key = (instance, *map(record.get, FLOW_KEY))
        ends = record["kind"] == "end"
        if FIGURES[0] in record:
            yield from self._take(key, record, now)
        elif ends and key not in self._open and key not in self._quiet:
            # Forgotten by the agent before it was reported.
            self.missed += 1
        if ends:
            self._quiet.pop(key, None)
            if (period := self._open.pop(key, None)) is not None:
                yield from self._report(key, period, PeriodEnd.ended)

    def due(self, now: float) -> Iterator[FlowReport]:
        """The reports of flows that are silent, or too many."""
        while self._open:
            key, period = next(iter(self._open.items()))
            silent = now - period.at >= self._idle
            if not silent and len(self._open) <= self._most:
                break
            del self._open[key]
            yield from self._report(key, period, PeriodEnd.idle if silent else PeriodEnd.full)
            self._quiet[key] = period.first, period.total
        while len(self._quiet) > _MOST_QUIET:
            _, (first, _) = self._quiet.popitem(last=False)
            self._floor = max(self._floor, first)

    def finish(self) -> Iterator[FlowReport]:
        """The reports of what is not reported yet."""
        while self._open:
            key, period = self._open.popitem(last=False)
            yield from self._report(key, period, PeriodEnd.stopped)

    def _take(self, key: _Key, record: dict[str, Any], now: float) -> Iterator[FlowReport]:
        check(record)
        first = float(record["first"])
        sent, bytes_sent, received, bytes_received = (record[name] for name in FIGURES)
        total = Account(sent, bytes_sent, received, bytes_received, first + float(record["duration"]))
        period = self._open.get(key)
        if period is not None and period.first != first:
            del self._open[key]
            yield from self._report(key, period, PeriodEnd.ended)
            period = None
        if period is None:
            before = self._before(key, first, total)
            period = self._open[key] = _Period(first, before.last or first, now, before, total, record)
        period.total, period.at, period.record = total, now, {**period.record, **record}
        self._open.move_to_end(key)
        if now - period.start >= self._active and record["kind"] != "end":
            yield from self._report(key, period, PeriodEnd.active)
            period.start, period.before = now, total

    def _before(self, key: _Key, first: float, total: Account) -> Account:
        """The part of a flow's total that is not reported."""
        known = self._quiet.pop(key, None)
        if known is not None and known[0] == first:
            return known[1]
        # A flow that is older than the export is reported from now on.
        return total if first < self._floor else _NOTHING

    def _report(self, key: _Key, period: _Period, why: PeriodEnd) -> Iterator[FlowReport]:
        passed = period.total.since(period.before)
        figures = (passed.packets_sent, passed.bytes_sent, passed.packets_received, passed.bytes_received)
        try:
            wanted = any(figures[::2]) and self._what.match(period.record)
        except (AttributeError, TypeError, ValueError):
            wanted, figures = False, (-1, -1, -1, -1)
        if min(figures) < 0:
            # Totals that fall, or values of other types than a filter expects: written by a worker that was taken over.
            self.missed += 1
        elif wanted:
            end = max(period.start, period.total.last)
            yield FlowReport(str(key[0]), period.record, period.start + self.epoch, end + self.epoch, passed, why)
