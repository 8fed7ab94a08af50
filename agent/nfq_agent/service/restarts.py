"""Decides when a worker that died is started again, and when it has died too often. Reads no clock."""

from __future__ import annotations

from collections import deque
from typing import Final

# A worker that dies this often within this many seconds is not started again.
MOST_DEATHS: Final = 5
WITHIN: Final = 30.0
_FIRST_BACK_OFF: Final = 0.1


class Deaths:
    """The latest deaths of one worker. True if there was any."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=MOST_DEATHS)

    def __bool__(self) -> bool:
        return bool(self._times)

    def recent(self, now: float) -> int:
        """How many deaths there were within the last WITHIN seconds."""
        return sum(now - death < WITHIN for death in self._times)

    def add(self, now: float) -> float | None:
        """Count a death. Returns the seconds to wait before the next start, None if the worker has died too often.

        After the first death the worker starts at once, because traffic waits. now: seconds of the monotonic clock.
        """
        self._times.append(now)
        recent = self.recent(now)
        if recent >= MOST_DEATHS:
            return None
        return 0.0 if recent == 1 else _FIRST_BACK_OFF * 2 ** (recent - 2)
