"""`top`: the live flows of the running agent on a terminal, with keys to filter, sort and group them."""

from __future__ import annotations

import math
import os
import signal
import textwrap
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, TypeVar

from rich.console import Console, Group, JustifyMethod
from rich.live import Live
from rich.table import Table
from rich.text import Text

from nfq_agent.cli import loading, show
from nfq_agent.cli.flags import Flags
from nfq_agent.cli.flow_records import (
    EVERY,
    Questions,
    end_of,
    printable,
    protocol_and_names,
    read_filter,
    verdict_of,
    who_of,
)
from nfq_agent.cli.keys import Keys
from nfq_agent.cli.live_flows import Grouping, Line, LiveFlows, Only, Page, Sort, View
from nfq_agent.flow_filter import FilterError, FilterPart, parse
from nfq_agent.service import control
from nfq_agent.values import duration_text, size_text

_HELP: Final = "f filter  s sort  g group  d drops  w would-drops  p pause  q quit"
_SHORT_HELP: Final = "f filter s sort g group d drops w would p pause q quit"
# Lines besides those of the table: two above, its head, one below.
_FRAME: Final = 4
# From these widths on there is room for more columns.
_WIDE: Final = 120
_MIDDLE: Final = 72
# Flows that are printed at the end, without a screen.
_MOST: Final = 1000
# Seconds between two tables without a screen and without an end.
_PRINTED: Final = 5.0
_STYLES: Final = {"drop": "red", "reject": "red", "would drop": "yellow"}
_E = TypeVar("_E", bound=Enum)


@dataclass(frozen=True, slots=True)
class _Column:
    """share: of the free width, None for the width of the text. least: the least width."""

    title: str
    share: int | None = None
    least: int = 0
    right: bool = False


_FIGURES: Final = {
    Sort.RATE: _Column("B/s", None, 8, True),
    Sort.BYTES: _Column("bytes", None, 8, True),
    Sort.PACKETS: _Column("packets", None, 8, True),
    Sort.NEWEST: _Column("age", None, 8, True),
}
_WHO: Final = _Column("who", 3, 3)
_NAME: Final = _Column("name", 5, 8)
_SOURCE: Final = _Column("source", 4, 15)
_DESTINATION: Final = _Column("destination", 5, 15)
# A verdict is always whole; the others share what is left.
_VERDICT: Final = _Column("verdict", None, 10)
_RULE: Final = _Column("rule", 5, 6)
_COUNTS: Final = tuple(_Column(title, None, 7, True) for title in ("flows", "dropped", "would"))


@dataclass(slots=True)
class Screen:
    """What the terminal shows, and what a key changes. typed: the filter that is being typed, None while none is.

    unshown: how many flows the agent does not report, in words. away: why the agent does not answer at the moment.
    """

    instance: str
    live: LiveFlows
    view: View
    text: str = ""
    typed: str | None = None
    wrong: str = ""
    skipped: int = 0
    paused: bool = False
    ended: bool = False
    missed: int = 0
    unshown: str = ""
    away: str = ""
    page: int = 1
    _frozen: tuple[LiveFlows, float] | None = field(default=None, repr=False)
    _drawn: float = field(default=0.0, repr=False)

    def press(self, key: str) -> None:
        """Do what the key is for."""
        if self.typed is not None:
            self._type(key, self.typed)
            return
        match key:
            case "q":
                self.ended = True
            case "p":
                self.paused = not self.paused
                self._frozen = (self.live.copy(), self._drawn) if self.paused else None
            case "f" | "/":
                self.typed, self.wrong = self.text, ""
            case "s":
                self.view.sort = _next(self.view.sort)
            case "g":
                self.view.grouping = _next(self.view.grouping)
            case "d":
                self.view.only = Only.ALL if self.view.only is Only.DROPS else Only.DROPS
            case "w":
                self.view.only = Only.ALL if self.view.only is Only.WOULD_DROPS else Only.WOULD_DROPS
            case "up" | "down" | "page-up" | "page-down" | "home":
                by = {"up": -1, "down": 1, "page-up": -self.page, "page-down": self.page}
                self.skipped = max(0, self.skipped + by[key]) if key in by else 0
                return
            case _:
                return
        self.skipped = 0

    def _type(self, key: str, typed: str) -> None:
        if key == "enter":
            try:
                self.view.part = parse(typed)
            except FilterError as error:
                self.wrong = str(error)
                return
            self.text, self.typed, self.wrong, self.skipped = typed, None, "", 0
        elif key == "escape":
            self.typed, self.wrong = None, ""
        elif key == "backspace":
            self.typed = typed[:-1]
        elif key == "erase":
            self.typed = ""
        elif key == "erase-word":
            self.typed = typed[: len(typed.rstrip()) - len(typed.split()[-1])] if typed.split() else ""
        elif len(key) == 1:
            self.typed = typed + key

    def draw(self, width: int, height: int, now: float) -> Group:
        """The whole screen, in `width` columns and `height` lines. now: monotonic seconds."""
        self._drawn = now
        self.page = max(1, height - _FRAME)
        found = self._found(now)
        if self.skipped > max(0, found.count - self.page):
            # There are fewer lines than before.
            self.skipped = max(0, found.count - self.page)
            found = self._found(now)
        shown = found.lines
        table = _groups(self.view, shown, width) if self.view.grouping is not Grouping.NONE else _flows(self.view, shown, width)
        gap = Text("\n" * (self.page - len(shown) - 1)) if len(shown) < self.page else None
        head = self._fault(width) or (self._title(found), self._settings())
        return Group(*head, table, *([gap] if gap is not None else []), self._foot(width))

    def report(self, width: int, now: float) -> Group:
        """The same without a screen: all lines, and no keys."""
        found = self.live.page(self.view, now, 0, _MOST)
        return Group(self._title(found), _flows(self.view, found.lines, width))

    def _found(self, now: float) -> Page:
        """What is shown: while it is paused, of the flows as they were then."""
        live, then = self._frozen or (self.live, now)
        return live.page(self.view, then, self.skipped, self.page)

    def _title(self, found: Page) -> Text:
        flows, dropped, would, rate = found.flows, found.dropped, found.would_drop, found.rate
        shown = f"{flows} flow{'s' * (flows != 1)}, {dropped} dropped, {would} would drop, {size_text(int(rate))}/s"
        missed = f", {self.missed} records missed" if self.missed else ""
        return _cut(f"Instance {self.instance}: {shown}{missed}", "bold")

    def _fault(self, width: int) -> tuple[Text, Text] | None:
        """A fault of the typed filter that takes two lines."""
        first, *others = textwrap.wrap(printable(self.wrong), width) or [""]
        return (_cut(first, "red"), _cut(" ".join(others), "red")) if others else None

    def _settings(self) -> Text:
        view = self.view
        if self.typed is not None:
            return _cut(self.wrong or "Enter applies the filter, Escape leaves it as it was", "red" if self.wrong else "")
        if self.away:
            return _cut(self.away, "red")
        parts = [f"{view.only.value}, by {view.grouping.value}, sorted by {view.sort.value}"]
        parts += [self.unshown] * bool(self.unshown)
        parts += [f"from line {self.skipped + 1}"] * (self.skipped > 0) + ["paused"] * self.paused
        parts += [f"filter: {self.text}"] * bool(self.text)
        return _cut("  ".join(parts))

    def _foot(self, width: int) -> Text:
        if self.typed is None:
            return _cut(_HELP if len(_HELP) <= width else _SHORT_HELP, "reverse")
        # The end of a long filter is shown: text is typed there.
        return _cut(f"filter: {self.typed[-(width - 10) :]}_", "reverse")


def _cut(text: str, style: str = "") -> Text:
    return Text(printable(text), style, no_wrap=True, overflow="ellipsis")


def _next(value: _E) -> _E:
    """The next value; after the last one, the first."""
    every = list(type(value))
    return every[(every.index(value) + 1) % len(every)]


def _table(columns: list[_Column]) -> Table:
    made = Table(box=None, padding=(0, 1, 0, 0), expand=True)
    for column in columns:
        justify: JustifyMethod = "right" if column.right else "left"
        made.add_column(
            column.title, justify=justify, no_wrap=True, overflow="ellipsis", ratio=column.share, min_width=column.least
        )
    return made


def _figure(sort: Sort, line: Line) -> str:
    match sort:
        case Sort.RATE:
            return size_text(int(line.rate))
        case Sort.BYTES:
            return size_text(line.bytes)
        case Sort.PACKETS:
            return str(line.packets)
        case Sort.NEWEST:
            return duration_text(line.age)


def _flows(view: View, lines: list[Line], width: int) -> Table:
    """One flow on each line. In a narrow terminal the first column is what they are sorted by."""
    wide = width >= _WIDE
    figures = list(Sort) if wide else [view.sort]
    made = _table([*(_FIGURES[sort] for sort in figures), _WHO, _NAME, *[_SOURCE] * wide, _DESTINATION, _VERDICT, _RULE])
    for line in lines:
        record, verdict = line.record, verdict_of(line.record)
        cells = [
            *(_figure(sort, line) for sort in figures),
            who_of(record) or "-",
            protocol_and_names(record),
            *[end_of(record, "src", "sport")] * wide,
            end_of(record, "dst", "dport"),
            verdict,
            printable(record.get("reason", "-")),
        ]
        style = "dim" if record["kind"] == "end" else _STYLES.get(verdict, "")
        made.add_row(*(Text(cell) for cell in cells), style=style)
    return made


def _groups(view: View, lines: list[Line], width: int) -> Table:
    """One group of flows on each line. What they are sorted by is shown; a narrow terminal has room for this figure alone."""
    sorts: tuple[Sort, ...]
    sorts = (Sort.NEWEST, Sort.RATE, Sort.BYTES) if view.sort is Sort.NEWEST else (Sort.RATE, Sort.BYTES, Sort.PACKETS)
    sorts = sorts if width >= _MIDDLE else (view.sort,)
    made = _table([*(_FIGURES[sort] for sort in sorts), *_COUNTS, _Column(view.grouping.value, 1, 15)])
    for line in lines:
        cells = (*(_figure(sort, line) for sort in sorts), str(line.flows), str(line.dropped), str(line.would_drop), line.name)
        made.add_row(*(Text(cell) for cell in cells), style="red" if line.dropped else "yellow" if line.would_drop else "")
    return made


def top(flags: Flags, what: str, seconds: float, as_json: bool) -> int:
    """Show the flows until the time is over, q or Ctrl-C. as_json: print them once, at the end."""
    part = read_filter(what)
    if part is None:
        return 2
    instance = loading.instance_of(flags)
    questions = Questions(instance, None)
    screen = Screen(instance, LiveFlows(), View(part), what)
    console = show.console(on_standard_error=as_json, width_of_library=True)
    # A terminal without commands for its cursor (TERM=dumb) has no screen to draw on.
    on_screen = console.is_terminal and not console.is_dumb_terminal and not as_json
    endless = math.isinf(seconds) and not on_screen
    if endless and as_json:
        show.error("nfq-agent: one object is printed at the end: after --for TIME, else by Ctrl-C")
    elif endless:
        show.error(
            f"nfq-agent: no terminal for a screen: a table every {_PRINTED:g} s until Ctrl-C; --for TIME prints one at the end"
        )
    try:
        with _interrupted_by(signal.SIGTERM, signal.SIGQUIT):
            _watch(questions, screen, console, seconds, on_screen, _PRINTED if endless and not as_json else math.inf)
    except control.ControlError as error:
        show.error(f"nfq-agent: {error}")
        return 1
    except KeyboardInterrupt:
        pass
    if as_json:
        show.json_object({"flows": _objects(screen.live, part), "missed": questions.missed, "unshown": questions.unshown})
    elif not on_screen:
        console.print(screen.report(console.width, time.monotonic()))
    questions.say_missed()
    return 0


@contextmanager
def _interrupted_by(*signals: signal.Signals) -> Iterator[None]:
    """These signals do what Ctrl-C does: the terminal gets its screen and its settings back."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(questions: Questions, screen: Screen, console: Console, seconds: float, on_screen: bool, printed: float) -> None:
    """Ask twice a second and at the end, and draw then and after each key. Raises ControlError.

    printed: seconds between two tables where there is no screen.
    """
    asks = time.monotonic()
    ends, prints = asks + seconds, asks + printed
    with ExitStack() as stack:
        shown = stack.enter_context(Live(console=console, auto_refresh=False, screen=True)) if on_screen else None
        keys = stack.enter_context(Keys(on_screen))
        while (now := time.monotonic()) < ends and not screen.ended:
            if now >= asks:
                _take(questions, questions.ask_again(), screen, now)
                asks = now + EVERY
            if now >= prints:
                console.print(Text(time.strftime("%Y-%m-%d %H:%M:%S")), screen.report(console.width, now))
                prints = now + printed
            if shown is not None:
                shown.update(screen.draw(console.width, console.height, now), refresh=True)
            for key in keys.wait(max(0.0, min(asks, ends) - time.monotonic())):
                if key == "suspend":
                    _suspend(keys, shown)
                screen.press(key)
    if not screen.ended:
        _take(questions, questions.ask_at_the_end(), screen, time.monotonic())


def _suspend(keys: Keys, shown: Live | None) -> None:
    """Stop as Ctrl-Z stops a program, with the terminal as it was; continue when the shell says so."""
    if shown is not None:
        shown.stop()
    keys.restore()
    # The whole job, as the terminal would; an orphan is not stopped (setpgid(2)).
    os.kill(0, signal.SIGTSTP)
    keys.__enter__()
    if shown is not None:
        shown.start()


def _take(questions: Questions, records: list[dict[str, Any]], screen: Screen, now: float) -> None:
    screen.live.add(records, now)
    screen.missed, screen.away = questions.missed, questions.away
    screen.unshown = questions.unshown_flows if questions.unshown else ""


def _objects(live: LiveFlows, part: FilterPart) -> list[dict[str, Any]]:
    lines = live.page(View(part), time.monotonic(), 0, _MOST).lines
    return [{**line.record, "rate": line.rate} for line in lines]
