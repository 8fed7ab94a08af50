"""How much a worker does for those who watch it, until its next look around. Pure: what happened goes in, counts come out.

A watcher must not cost a packet its verdict. What is done for watchers in Python costs many times what a packet costs without it,
so it is limited: while the worker waits for packets now and then, the limit grows; once packets wait for it, little is left.
"""

from __future__ import annotations

from typing import Final

# Of one step: new flows that elements are shown for the watchers alone, records that are written, packets that are looked at.
FLOWS: Final = 2
RECORDS: Final = 5
PACKETS: Final = 20
# The steps of a worker that has time.
MOST: Final = 40
# A worker that is busy for a larger share of the time gets fewer steps.
_BUSY: Final = 0.5
# A worker for which packets wait gets one step for so many seconds of its own processor time.
_EVERY: Final = 0.05


class WatchShare:
    """What is left until the next look: flows, records, packets."""

    def __init__(self, most: int = MOST) -> None:
        """most: steps."""
        self._most = most
        self._steps = self._most
        self._at = self._used = 0.0
        self.flows = self.records = self.packets = 0

    def renew(self, caught_up: bool, now: float, used: float) -> None:
        """A look around. caught_up: no packet waited at some moment since the last one. now: monotonic seconds. used: seconds of
        processor time of this process so far."""
        if not caught_up:
            self._steps = 1
            if used - self._used < _EVERY:
                return
        elif now > self._at:
            busy = (used - self._used) / (now - self._at)
            change = 1 + self._steps // 4
            self._steps = min(self._most, self._steps + change) if busy < _BUSY else max(1, self._steps - change)
        self._at, self._used = now, used
        self.flows, self.records, self.packets = FLOWS * self._steps, RECORDS * self._steps, PACKETS * self._steps
