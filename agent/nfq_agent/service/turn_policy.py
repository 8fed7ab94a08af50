"""How long a worker's next turn is, and whether it waits for packets. Pure: counts and seconds in, decisions out.

Two kinds of turn alternate. One takes the packets that are there and answers them at the end; it is the fastest under load. The
other waits, and answers each packet as it comes; it is the fastest where packets come few at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from nfq_agent.service.auto_poll import TRIAL, AutoPoll, Polled

# Packets of a usual turn: enough to share the cost of a system call, few enough that no packet waits long for its verdict.
BUDGET: Final = 256
# The first turn of a new process takes this many packets, and each later one twice as many: packets may have waited for it, and
# code that runs for the first time is slower. Turns in which elements look at each packet take as few: the verdicts go out when
# all are judged.
FIRST: Final = 64
# If at most this many packets wait, the next turn waits for more: how many it answers at most, and how long it waits for each, in
# seconds. A turn is counted at its end: who asks for the counters right behind the last packet gets those of this long before. So
# the wait is shorter than any program takes to start.
FEW: Final = 32
AWAITED: Final = 512
PATIENCE: Final = 0.02
# A worker that falls behind takes longer turns, up to this many packets, while a turn ends within this many seconds. A queue that
# is emptied and filled again stays in the processor's caches; one that is always full does not. The turns grow slowly, since
# after a short turn there is soon room again for the rest of a burst.
STEP: Final = 64
LONGEST: Final = 4096
SHORT: Final = 0.01
# Verdicts kept by five-tuple. At this number all are forgotten: cheaper than knowing which was used last.
REMEMBERED: Final = 65536


@dataclass(frozen=True, slots=True)
class Turn:
    """The next turn. budget: how many packets it takes at most. waits: it waits for packets and answers each as it comes."""

    budget: int
    waits: bool


class TurnPolicy:
    """Chooses each turn by the result of the previous one.

    may_wait: the source has turns that wait. busy_poll: seconds to poll for packets before sleeping, 0 for none, "auto" while
    it pays: then `report` is to be called after each turn.
    """

    def __init__(self, may_wait: bool, busy_poll: float | Literal["auto"]) -> None:
        self._may_wait = may_wait
        self._auto = AutoPoll() if busy_poll == "auto" else None
        self._busy_poll = 0.0 if busy_poll == "auto" else busy_poll
        self._budget = FIRST
        # The turn before this one met packets, so that waiting may be worth it.
        self._came = False
        self._waits = False

    @property
    def next(self) -> Turn:
        """The turn to take now."""
        if not self._waits:
            return Turn(self._budget, False)
        return Turn(AWAITED if self._auto is None or not self._auto.tries else TRIAL, True)

    def sleeps(self, count: int) -> bool:
        """True if the loop is to sleep until packets come. count: packets of the turn that ended, of which `ended` was told."""
        return count == 0 and not self._waits

    @property
    def adapts(self) -> bool:
        """True if `poll` changes with what is reported."""
        return self._auto is not None

    @property
    def poll(self) -> float:
        """Seconds to poll for packets before sleeping."""
        return self._busy_poll

    @property
    def polls(self) -> float:
        """Seconds for which the loop itself polls before it sleeps: only where no turn of the source does."""
        return 0.0 if self._may_wait else self._busy_poll

    def report(self, count: int, now: float, polled: Polled) -> bool:
        """Record what a turn met and polled, for "auto" (see `AutoPoll.report`). True if `poll` is another one now."""
        if self._auto is None:
            return False
        self._auto.report(count, now, polled)
        before, self._busy_poll = self._busy_poll, self._auto.seconds
        return before != self._busy_poll

    def ended(self, turn: Turn, count: int, seconds: float) -> None:
        """Record a turn that ended: how many packets it met, and how long it took."""
        if turn.waits:
            # Then one turn that does not wait: it shows whether more packets come by now.
            self._waits = False
            self._came = count > 0
            return
        self._waits = self._may_wait and (0 < count <= FEW or (count == 0 and self._came))
        # With busy polling the next turn polls after any packet, not only after few.
        self._came = count > 0 and self._busy_poll > 0
        if turn.budget < BUDGET:
            self._budget = min(2 * turn.budget, BUDGET)
            return
        grows = count == turn.budget and seconds < SHORT
        self._budget = min(turn.budget + STEP, LONGEST) if grows else BUDGET


def forgets(remembered: int) -> bool:
    """True if the verdicts that are kept have become too many, and all are to be forgotten."""
    return remembered >= REMEMBERED
