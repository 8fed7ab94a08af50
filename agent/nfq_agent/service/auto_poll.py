"""Whether a worker polls for packets before it sleeps, with `busy_poll = "auto"`. Pure: counts and seconds in, a decision out.

It tries where packets come close together, continues while at least half of the polls end with a packet, and never polls for more
than a share of the time. Polls that find nothing also show a busy processor: while a worker polls there, the process that would
send the next packet does not run. tests/bench/NOTES.md has the measurements behind the constants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# Seconds of one poll: about what a sleep and a wake-up cost.
POLL: Final = 20e-6
# Packets are counted over the first number of seconds; polling is tried if they come at most the second number apart. The gaps of
# a worker that sleeps include its wake-ups: this is more than POLL.
WINDOW: Final = 0.01
APART: Final = 100e-6
# Polls after which it decides whether polling pays.
ENOUGH: Final = 16
# Seconds until the next attempt after one that did not pay: doubled each time, up to LONGEST.
PAUSE: Final = 0.05
LONGEST: Final = 1.0
# The share of one processor that polls may take, and for how many seconds a worker that did not poll may take more.
SHARE: Final = 0.6
SAVED: Final = 0.1
# Packets of a turn while it is not known whether polls pay.
TRIAL: Final = 32


@dataclass(frozen=True, slots=True)
class Polled:
    """The polls since the last report.

    times: how many. found: how many ended with a packet. seconds: of all together.
    """

    times: int = 0
    found: int = 0
    seconds: float = 0.0


class AutoPoll:
    """Decides from what the worker reports after each of its turns."""

    def __init__(self) -> None:
        self._on = False
        self._proven = False
        self._pause = PAUSE
        self._again = 0.0
        # Seconds that may be spent; negative after a long turn.
        self._left = 0.0
        self._last: float | None = None
        self._begun = 0.0
        self._packets = 0
        self._times = self._found = 0

    @property
    def seconds(self) -> float:
        """Seconds to poll for the next packet; 0 for none."""
        return POLL if self._on and self._left > 0 else 0.0

    @property
    def tries(self) -> bool:
        """True while it polls and it is not known whether that pays: turns are to be short."""
        return self._on and not self._proven

    def report(self, packets: int, now: float, polled: Polled) -> None:
        """Record a turn that ended at `now`, in seconds of any clock: how many packets it met, and what it polled."""
        passed = 0.0 if self._last is None else now - self._last
        self._last = now
        self._left = min(self._left + SHARE * passed, SHARE * SAVED) - polled.seconds
        if self._on:
            self._weigh(now, polled)
        else:
            self._watch(packets, now)

    def _watch(self, packets: int, now: float) -> None:
        self._packets += packets
        passed = now - self._begun
        if passed < WINDOW:
            return
        close = self._packets > 0 and passed <= APART * self._packets
        self._begun, self._packets = now, 0
        if close and now >= self._again:
            self._on, self._proven = True, False
            self._times = self._found = 0

    def _weigh(self, now: float, polled: Polled) -> None:
        self._times += polled.times
        self._found += polled.found
        if self._times < ENOUGH:
            return
        if 2 * self._found >= self._times:
            self._proven, self._pause = True, PAUSE
        else:
            self._on = False
            self._again, self._pause = now + self._pause, min(2 * self._pause, LONGEST)
            self._begun, self._packets = now, 0
        self._times = self._found = 0
