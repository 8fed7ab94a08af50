"""The line in the log that says how many packets were dropped without a line of their own, at most once a minute."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from nfq_agent.counters import growth
from nfq_agent.log import Log

# Seconds between two lines.
_EVERY: Final = 60.0


@dataclass(frozen=True, slots=True)
class Drops:
    """Packets that a queue or an inline link dropped since the start. cause: the settings; empty where each is logged."""

    title: str
    count: int
    cause: str


class DropLog:
    """Compares counts of drops with those that it said."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._said: dict[str, int] = {}
        self._next = 0.0

    def say(self, find: Callable[[], Iterable[Drops]], now: float) -> None:
        """find: asked only when a line may be written. now: seconds since any fixed moment."""
        if now < self._next:
            return
        parts = []
        for each in find():
            # A worker that was replaced by a reload counts from zero.
            more = growth(each.count, self._said.get(each.title, 0))
            self._said[each.title] = each.count
            if each.cause and more:
                parts.append(f"{each.title} dropped {more} packets (by {each.cause})")
        if parts:
            self._next = now + _EVERY
            self._log(
                f"{'; '.join(parts)} since the start or the last such line, and no element logs them: the element log with "
                'only = "drop" does',
                "warning",
                event="drops",
            )
