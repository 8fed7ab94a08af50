"""Limits what elements log: a peer that makes an element emit a line for each packet must not fill the journal.

One for each worker and each process of a proxy. Lines beyond the rate are counted; the next line that is emitted has the count.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from nfq_agent.config.models import ElementSpec
from nfq_agent.element import Emit
from nfq_agent.log import LEVELS
from nfq_agent.rate import LINES, WARNINGS, LimitedEmit

_WARNING: Final = LEVELS["warning"]


class ElementLog:
    """Makes the `emit` of each element."""

    def __init__(self, emit: Emit, suppressed: Callable[[int], None], clock: Callable[[], float] = time.monotonic) -> None:
        """emit: writes one event. suppressed: called with the number of lines that are not written. clock: seconds."""
        self._emit = emit
        self._suppressed = suppressed
        self._clock = clock

    def of(self, spec: ElementSpec) -> Emit:
        """For one element: LINES a second; WARNINGS a second of warnings and errors. Some limit themselves, by their options."""
        if spec.cls.limits_itself:
            return self._count_left_out
        lines, warnings = LimitedEmit(self._emit, LINES, LINES), LimitedEmit(self._emit, WARNINGS, WARNINGS)

        def emit(message: str, level: str = "info", **fields: Any) -> None:
            limited = warnings if LEVELS.get(level, _WARNING) <= _WARNING else lines
            if not limited(self._clock(), message, level=level, **fields):
                self._suppressed(1)

        return emit

    def _count_left_out(self, message: str, level: str = "info", **fields: Any) -> None:
        """Of an element that limits itself: what it has left out is counted when it says so."""
        if count := fields.get("suppressed"):
            self._suppressed(count)
        self._emit(message, level=level, **fields)
