"""Counts and logs what elements raise, by the element's name. The lines wait until the verdicts of the turn are sent."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from nfq_agent.counters import Counters
from nfq_agent.element import Emit, PacketElement
from nfq_agent.rate import LimitedEmit


class ElementErrors:
    """One for each worker. It logs one line a second; the next one has the number of those left out."""

    def __init__(self, counters: Counters, emit: Emit) -> None:
        self._counters = counters
        self._limited = LimitedEmit(emit)
        # Of this turn: the first, and how many there were besides.
        self._first: tuple[str, dict[str, Any]] | None = None
        self._others = 0

    def add(self, error: Exception, when: str, then: str = "", **fields: Any) -> None:
        """Count what an element raised. when, then: parts of the line. fields: of the line, `element` where it is known."""
        self._counters.errors += 1
        if self._first is not None:
            self._others += 1
            return
        name, place = raised_in(error)
        name = fields.pop("element", name)
        what = f"element {name}" if name else "an element"
        known = {"element": name, **fields} if name else fields
        self._first = f"{what} failed {when}: {type(error).__name__}: {error}{place}{then}", known

    def call(self, calls: Iterable[tuple[str, Callable[[], None]]], when: str) -> None:
        """Call each of these, which come with the names of their elements; what one raises keeps no other from being called."""
        for name, call in calls:
            try:
                call()
            except Exception as error:
                self.add(error, when, element=name)

    def log(self, now: float) -> None:
        """Log what was raised since the last time. now: seconds."""
        if self._first is None:
            return
        (message, fields), self._first = self._first, None
        others, self._others = self._others, 0
        written = self._limited(now, message, level="error", **fields)
        self._limited.leave_out(now, others)
        self._counters.suppress(others + (not written))

    def finish(self) -> None:
        """Log how many lines were left out since the last one."""
        self._limited.finish("elements failed")


def raised_in(error: Exception) -> tuple[str, str]:
    """The name of the element that raised it, empty if it is not known; and where, as ` (FILE:LINE)`."""
    step, name, place = error.__traceback__, "", ""
    while step is not None:
        place = f" ({step.tb_frame.f_code.co_filename}:{step.tb_lineno})"
        owner = step.tb_frame.f_locals.get("self")
        if isinstance(owner, PacketElement):
            name = owner.name
        step = step.tb_next
    return name, place
