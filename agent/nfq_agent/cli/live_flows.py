"""The flows of the running agent as `top` keeps them: by their latest records, with rates; filtered, grouped and sorted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from nfq_agent.cli.flow_records import end_of, names_of, verdict_of, who_of
from nfq_agent.flow_filter import EVERYTHING, FilterPart
from nfq_agent.flow_report import FLOW_KEY

# Seconds after which a silent flow is no longer shown, an ended one is no longer shown, and a rate counts as 0.
_SILENT: Final = 10.0
_ENDED: Final = 5.0
_STILL: Final = 5.0


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


@dataclass(frozen=True, slots=True)
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


_ORDER: Final[Mapping[Sort, Callable[[Line], float]]] = {
    Sort.RATE: lambda line: -line.rate,
    Sort.BYTES: lambda line: -line.bytes,
    Sort.PACKETS: lambda line: -line.packets,
    Sort.NEWEST: lambda line: line.age,
}


class LiveFlows:
    """All flows that the agent reports, for a few seconds after their last packet."""

    def __init__(self) -> None:
        self._rows: dict[tuple[Any, ...], _Row] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, records: Iterable[dict[str, Any]], now: float) -> None:
        """Take in the records of one answer. now: monotonic seconds."""
        for record in records:
            key = tuple(record.get(part) for part in FLOW_KEY)
            row = self._rows.get(key)
            if row is None:
                row = self._rows[key] = _Row(record, now)
            elif row.ended and record["kind"] != "end":
                row.before, row.ended = None, False
            elif now > row.at:
                row.before = row.record.get("bytes", 0), row.at
            row.record, row.at, row.ended = record, now, record["kind"] == "end"
        for key in [key for key, row in self._rows.items() if now - row.at > (_ENDED if row.ended else _SILENT)]:
            del self._rows[key]

    def lines(self, view: View, now: float) -> list[Line]:
        """What the view shows, the first line first."""
        found = [_line(row, now) for row in self._rows.values() if _shown(row.record, view)]
        if view.grouping is not Grouping.NONE:
            found = _grouped(found, _GROUPED_BY[view.grouping])
        order = _ORDER[view.sort]
        return sorted(found, key=lambda line: (order(line), -line.bytes))


def _shown(record: dict[str, Any], view: View) -> bool:
    if view.only is Only.WOULD_DROPS and not record.get("would"):
        return False
    if view.only is Only.DROPS and not record.get("would") and record.get("verdict") not in ("drop", "reject"):
        return False
    return view.part.match(record)


def _line(row: _Row, now: float) -> Line:
    record = row.record
    verdict = verdict_of(record)
    return Line(
        record, "", 1, row.rate(now), record.get("bytes", 0), record.get("packets", 0), record.get("duration", 0.0),
        verdict in ("drop", "reject"), verdict == "would drop",
    )  # fmt: skip


def _grouped(lines: Iterable[Line], by: Callable[[dict[str, Any]], str]) -> list[Line]:
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(by(line.record) or "-", []).append(line)
    return [
        Line(
            each[0].record, name, len(each), sum(line.rate for line in each), sum(line.bytes for line in each),
            sum(line.packets for line in each), min(line.age for line in each), sum(line.dropped for line in each),
            sum(line.would_drop for line in each),
        )
        for name, each in groups.items()
    ]  # fmt: skip
