"""How long verdicts take, as a histogram in memory that a worker shares with the supervisor. No I/O, no clock."""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

from nfq_agent.counters import Slots

# Upper bounds of the buckets, in seconds. What takes longer is in the last bucket.
BOUNDS: Final = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 1e-3, 2.5e-3, 1e-2, 5e-2, 0.25, 1.0)
NANOSECONDS: Final = "nanoseconds"
_NAMES: Final = (*(f"{bound:g}" for bound in BOUNDS), "+Inf", NANOSECONDS)
SIZE: Final = len(_NAMES)


class Latency(Slots):
    """Samples of how long the first packet of a turn waited in the worker until its verdict was sent: one sample a turn.

    That packet waits longest of those that are answered together. The time in the kernel's queue is not in it.
    """

    def __init__(self, memory: memoryview | None = None) -> None:
        super().__init__(_NAMES, memory)

    def observe(self, seconds: float) -> None:
        """One sample."""
        self._slots[bisect_left(BOUNDS, seconds)] += 1
        self._slots[len(BOUNDS) + 1] += int(seconds * 1e9)
