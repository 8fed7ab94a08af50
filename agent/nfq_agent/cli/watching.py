"""`top` and `trace`: the flows and packets of the running agent, as its workers tell them while they are asked."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import typer
from rich.console import Console, JustifyMethod
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from nfq_agent.cli import loading, show
from nfq_agent.cli.app import Flags
from nfq_agent.flow_filter import FilterError, FilterPart, parse
from nfq_agent.service import control
from nfq_agent.values import duration, size_text

# Seconds between two questions, and after which a silent flow is no longer shown.
_EVERY: Final = 0.5
_SILENT: Final = 10.0
_ROWS: Final = 1000
# The columns of `top`: share of the free width, None for what the text needs; least width.
_COLUMNS: Final = (
    ("B/s", None, 6),
    ("who", 2, 3),
    ("name", 4, 8),
    ("destination", 4, 15),
    ("verdict", None, 10),
    ("rule", 3, 6),
)


def seconds_of(text: str) -> float:
    """`60`, `60s` or `5m` in seconds; an empty text has no end. Raises typer.BadParameter."""
    try:
        return math.inf if not text else float(text) if text.isdecimal() else duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _filter(text: str) -> FilterPart | None:
    try:
        return parse(text)
    except FilterError as error:
        print(f"nfq-agent: {error.pointed}", file=sys.stderr)
        return None


def _batches(instance: str, seconds: float, packets: str | None) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """The records of each half second, and how many of them this reader missed. Raises ControlError."""
    places: dict[str, Any] = {}
    ends = time.monotonic() + seconds
    while (now := time.monotonic()) < ends:
        said = control.ask(instance, {"verb": "flows", "places": places, "packets": packets})
        if not said.get("ok"):
            raise control.ControlError(str(said.get("message")))
        places = said["places"]
        yield said["records"], int(said["missed"])
        time.sleep(max(0.0, min(_EVERY, ends - now)))


def _said_missed(missed: int) -> None:
    if missed:
        show.note(f"{missed} records were missed: more came than this terminal was told")


def trace(flags: Flags, what: str, seconds: float, as_json: bool) -> int:
    """Print each packet that matches, for so many seconds. Exit 1 if no agent can be asked."""
    if _filter(what) is None:
        return 2
    missed = 0
    try:
        for records, more in _batches(loading.instance_of(flags), seconds, what):
            missed += more
            for record in records:
                if record["kind"] == "packet":
                    print(json.dumps(record) if as_json else "\n".join(_way(record)), flush=True)
    except control.ControlError as error:
        print(f"nfq-agent: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    _said_missed(missed)
    return 0


def _way(record: dict[str, Any]) -> Iterator[str]:
    """The lines of one packet: what it is, what each element said, and the verdict."""
    known = [name for name in (_who(record), _name(record)) if name]
    yield ", ".join((f"{record['packet']} {record.get('hook', '')}, {record['length']} bytes", *known))
    steps = record["steps"]
    answered = record["element"] == steps[-1][0] if steps else False
    for place, (element, rule) in enumerate(steps, 1):
        last = place == len(steps) and answered
        yield f"  {element}: {_verdict(record) if last else 'no answer'}{f' by {rule}' if rule and last else ''}"
    if not answered:
        yield f"  {record['element']}: {_verdict(record)}"


def _verdict(record: dict[str, Any]) -> str:
    return "would drop" if record.get("would") else str(record.get("verdict", "-"))


def _who(record: dict[str, Any]) -> str:
    return str(record.get("container") or record.get("unit") or "")


def _name(record: dict[str, Any]) -> str:
    protocol = str(record.get("protocol") or record.get("proto") or "")
    names = record.get("tls_sni") or record.get("http_host") or record.get("dns_name") or ""
    return f"{protocol} {names if isinstance(names, str) else ' '.join(names)}".strip()


@dataclass(slots=True)
class _Row:
    """One flow as it was told last. at: when, in monotonic seconds. rate: bytes a second, of the last two times."""

    record: dict[str, Any]
    at: float
    rate: float = 0.0


class LiveFlows:
    """The flows that match, by their latest records."""

    def __init__(self, what: FilterPart) -> None:
        self._what = what
        self._rows: dict[tuple[Any, ...], _Row] = {}

    def add(self, records: Iterable[dict[str, Any]], now: float) -> None:
        """Take in what came. now: monotonic seconds."""
        for record in records:
            if record["kind"] == "packet" or not self._what.match(record):
                continue
            key = tuple(record.get(part) for part in ("queue", "tap", "inline", "proto", "src", "sport", "dst", "dport"))
            if record["kind"] == "end":
                self._rows.pop(key, None)
                continue
            row = self._rows.get(key)
            if row is None:
                self._rows[key] = _Row(record, now)
            elif now > row.at:
                row.rate = max(0, record.get("bytes", 0) - row.record.get("bytes", 0)) / (now - row.at)
                row.record, row.at = record, now
        for key in [key for key, row in self._rows.items() if now - row.at > _SILENT]:
            del self._rows[key]

    def rows(self, most: int = _ROWS) -> list[tuple[float, dict[str, Any]]]:
        """Rate and record of the flows, the fastest first."""
        ordered = sorted(self._rows.values(), key=lambda row: (-row.rate, -row.record.get("bytes", 0)))
        return [(row.rate, row.record) for row in ordered[:most]]

    def table(self, most: int) -> Table:
        """For a terminal."""
        made = Table(box=None, padding=(0, 1, 0, 0), expand=True, title=f"{len(self._rows)} flows", title_justify="left")
        # A rate and a verdict are always whole; the others share what is left.
        for name, share, least in _COLUMNS:
            justify: JustifyMethod = "right" if name == "B/s" else "left"
            made.add_column(name, justify=justify, no_wrap=True, overflow="ellipsis", ratio=share, min_width=least)
        for rate, record in self.rows(most):
            target = f"{record['dst']}:{record['dport']}" if "dport" in record else record["dst"]
            who, reason = _who(record) or "-", record.get("reason", "-")
            cells = (size_text(int(rate)), who, _name(record), target, _verdict(record), reason)
            made.add_row(*map(escape, map(str, cells)))
        return made


def top(flags: Flags, what: str, seconds: float, as_json: bool) -> int:
    """Show the flows until the time is over or Ctrl-C. as_json: print them once, at the end."""
    part = _filter(what)
    if part is None:
        return 2
    live, missed = LiveFlows(part), 0
    console = Console(stderr=as_json)
    try:
        with Live(console=console, auto_refresh=False, screen=console.is_terminal and not as_json) as shown:
            for records, more in _batches(loading.instance_of(flags), seconds, None):
                missed += more
                live.add(records, time.monotonic())
                if not as_json:
                    shown.update(live.table(max(1, console.height - 3)), refresh=console.is_terminal)
    except control.ControlError as error:
        print(f"nfq-agent: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    if as_json:
        show.json_object({"flows": [{**record, "rate": rate} for rate, record in live.rows()], "missed": missed})
    _said_missed(missed)
    return 0
