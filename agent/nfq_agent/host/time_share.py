"""A share of the time that slow work may take, so that it does not delay other work. No I/O."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class TimeShare:
    """Allows work for a number of seconds at once, and on average for a share of the time.

    A fixed pause between two runs would do the same, but would refuse a run just after another.
    """

    def __init__(self, share: float, at_once: float, clock: Callable[[], float] = time.monotonic) -> None:
        """share: of the time, from 0 to 1. clock: seconds."""
        self._share = share
        self._at_once = at_once
        self._clock = clock
        self._left, self._counted = at_once, clock()

    def allows(self) -> bool:
        """Whether it may run now."""
        now = self._clock()
        self._left = min(self._at_once, self._left + (now - self._counted) * self._share)
        self._counted = now
        return self._left > 0

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Count the time that it takes."""
        began = self._clock()
        try:
            yield
        finally:
            self._left -= self._clock() - began
