"""The flows of the running agent as `top` keeps them: by their latest records, with rates; filtered, grouped and sorted."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from types import MappingProxyType
from typing import Any, Final

from nfq_agent.cli.flow_records import end_of, names_of, verdict_of, who_of
from nfq_agent.flow_filter import EVERYTHING, FilterPart
from nfq_agent.flow_report import FLOW_KEY

# Seconds after which a silent flow is no longer shown, an ended one is no longer shown, and a rate counts as 0.
_SILENT: Final = 10.0
_ENDED: Final = 5.0
_STILL: Final = 5.0
# Flows that are kept: of more, those that were told of last. The agent tells of 4,000 a second and worker.
MOST: Final = 50_000
_WOULD_DROP: Final = "would drop"
_DENIED: Final = frozenset(("drop", "reject"))


class Sort(Enum):
    """The order of the lines."""

    RATE = "rate"
    BYTES = "bytes"
    PACKETS = "packets"
    NEWEST = "newest"


class Grouping(Enum):
    """What one line shows."""

    NONE = "flow"
    UNIT = "unit"
    NAME = "name"
    DESTINATION = "destination"


class Only(Enum):
    """Which verdicts are shown."""

    ALL = "all"
    DROPS = "drops"
    WOULD_DROPS = "would-drops"


_GROUPED_BY: Final[Mapping[Grouping, Callable[[dict[str, Any]], str]]] = {
    Grouping.UNIT: who_of,
    Grouping.NAME: names_of,
    Grouping.DESTINATION: lambda record: end_of(record, "dst", "dport"),
}


@dataclass(slots=True)
class View:
    """What is shown, as the keys choose it."""

    part: FilterPart = EVERYTHING
    sort: Sort = Sort.RATE
    grouping: Grouping = Grouping.NONE
    only: Only = Only.ALL


@dataclass(slots=True)
class Line:
    """One flow or one group of flows. record: of the flow; of a group, of one of its flows. age: seconds since the newest began.

    name: of the group, empty for a flow. dropped, would_drop: flows of it.
    """

    record: dict[str, Any]
    name: str
    flows: int
    rate: float
    bytes: int
    packets: int
    age: float
    dropped: int
    would_drop: int


@dataclass(slots=True)
class _Row:
    """One flow. at: when it was reported last, in monotonic seconds. before: bytes and time of an earlier batch, for the rate."""

    record: dict[str, Any]
    at: float
    before: tuple[int, float] | None = None
    ended: bool = False

    def rate(self, now: float) -> float:
        """Bytes a second."""
        if self.before is None or self.ended or now - self.at > _STILL:
            return 0.0
        count, at = self.before
        grown: int = self.record.get("bytes", 0) - count
        return max(0, grown) / (self.at - at)


@dataclass(frozen=True, slots=True)
class Page:
    """Some of the lines, and figures of all. count: of all lines. rate: bytes a second."""

    lines: list[Line]
    count: int
    flows: int
    dropped: int
    would_drop: int
    rate: float


class LiveFlows:
    """All flows that the agent reports, for a few seconds after their last packet."""

    def __init__(self, rows: Mapping[tuple[Any, ...], _Row] = MappingProxyType({})) -> None:
        self._rows: dict[tuple[Any, ...], _Row] = dict(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def copy(self) -> LiveFlows:
        """The same flows, which stay as they are now."""
        return LiveFlows({key: replace(row) for key, row in self._rows.items()})

    def add(self, records: Iterable[dict[str, Any]], now: float) -> None:
        """Take in the records of one answer. now: monotonic seconds."""
        for record in records:
            key = tuple(record.get(part) for part in FLOW_KEY)
            # What is told last stands last.
            row = self._rows.pop(key, None)
            if row is None:
                row = _Row(record, now)
            elif row.ended and record["kind"] != "end":
                row.before, row.ended = None, False
            elif now > row.at:
                row.before = row.record.get("bytes", 0), row.at
            row.record, row.at, row.ended = record, now, record["kind"] == "end"
            self._rows[key] = row
        for key in [key for key, row in self._rows.items() if now - row.at > (_ENDED if row.ended else _SILENT)]:
            del self._rows[key]
        for key in list(itertools.islice(self._rows, max(0, len(self._rows) - MOST))):
            del self._rows[key]

    def lines(self, view: View, now: float) -> list[Line]:
        """All that the view shows, the first line first."""
        return self.page(view, now, 0, len(self._rows)).lines

    def page(self, view: View, now: float, first: int, most: int) -> Page:
        """The lines from `first` on, `most` of them: what is not shown costs a number or two for each flow."""
        rows = [row for row in self._rows.values() if _shown(row.record, view)]
        rates = [row.rate(now) for row in rows]
        verdicts = [verdict_of(row.record) for row in rows]
        dropped = [verdict in _DENIED for verdict in verdicts]
        would = [verdict == _WOULD_DROP for verdict in verdicts]
        if view.grouping is not Grouping.NONE:
            groups = _grouped(zip(rows, rates, dropped, would, strict=True), _GROUPED_BY[view.grouping])
            keys = [_order(view.sort, group.rate, group.bytes, group.packets, group.age) for group in groups]
            lines = [groups[place] for place in _first(keys, first, most)]
            count = len(groups)
        else:
            keys = [_order(view.sort, rate, *_figures(row.record)) for row, rate in zip(rows, rates, strict=True)]
            lines = [_line(rows[place], rates[place], dropped[place], would[place]) for place in _first(keys, first, most)]
            count = len(rows)
        return Page(lines, count, len(rows), sum(dropped), sum(would), sum(rates))


def _first(keys: Sequence[tuple[float, float]], first: int, most: int) -> list[int]:
    """The places of keys from the `first` smallest on."""
    return heapq.nsmallest(first + most, range(len(keys)), key=keys.__getitem__)[first:]


def _shown(record: dict[str, Any], view: View) -> bool:
    if view.only is Only.WOULD_DROPS and not record.get("would"):
        return False
    if view.only is Only.DROPS and not record.get("would") and record.get("verdict") not in ("drop", "reject"):
        return False
    return view.part.match(record)


def _figures(record: dict[str, Any]) -> tuple[int, int, float]:
    """Bytes, packets and age of a flow."""
    return record.get("bytes", 0), record.get("packets", 0), record.get("duration", 0.0)


def _order(sort: Sort, rate: float, count: int, packets: int, age: float) -> tuple[float, float]:
    """What sorts a flow or a group: the least comes first. count: of bytes."""
    match sort:
        case Sort.RATE:
            return -rate, -count
        case Sort.BYTES:
            return -count, -count
        case Sort.PACKETS:
            return -packets, -count
        case Sort.NEWEST:
            return age, -count


def _line(row: _Row, rate: float, dropped: bool, would_drop: bool) -> Line:
    return Line(row.record, "", 1, rate, *_figures(row.record), int(dropped), int(would_drop))


def _grouped(flows: Iterable[tuple[_Row, float, bool, bool]], by: Callable[[dict[str, Any]], str]) -> list[Line]:
    """A line for each group."""
    groups: dict[str, Line] = {}
    for row, rate, dropped, would_drop in flows:
        name = by(row.record) or "-"
        group = groups.get(name)
        if group is None:
            group = groups[name] = Line(row.record, name, 0, 0.0, 0, 0, math.inf, 0, 0)
        count, packets, age = _figures(row.record)
        group.flows += 1
        group.rate += rate
        group.bytes += count
        group.packets += packets
        group.age = min(group.age, age)
        group.dropped += dropped
        group.would_drop += would_drop
    return list(groups.values())
