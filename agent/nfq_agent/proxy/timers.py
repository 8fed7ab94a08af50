"""When the streams of connections have to be called again. No I/O, no clock."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from nfq_agent.proxy.relay import Pair


class Timers:
    """At most one time for each connection, the earliest."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Pair]] = []
        self._order = 0

    def set(self, pair: Pair) -> None:
        """Note when a pair's stream is to be woken, if that is earlier than the noted time."""
        due = None if pair.stream is None else pair.stream.due
        if due is not None and (pair.timed is None or due < pair.timed):
            pair.timed = due
            self._order += 1
            heapq.heappush(self._heap, (due, self._order, pair))

    @property
    def due(self) -> float | None:
        """The earliest time; None if there is none."""
        return self._heap[0][0] if self._heap else None

    def woken(self, now: float) -> Iterator[Pair]:
        """The pairs whose time has come, each once."""
        while self._heap and self._heap[0][0] <= now:
            _, _, pair = heapq.heappop(self._heap)
            pair.timed = None
            yield pair

    def prune(self, running: int) -> None:
        """A pair has ended: a time far ahead must not keep those that have. running: how many have not."""
        if len(self._heap) > 64 + 2 * running:
            self._heap = [timer for timer in self._heap if timer[2].over is None]
            heapq.heapify(self._heap)
