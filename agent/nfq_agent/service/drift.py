"""When the rules are checked next, how often they were repaired, and for how long some were not in force. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from nfq_agent.service.status import DriftStatus

# The longest pause, in seconds, between two checks while another program keeps changing the rules.
LONGEST_PAUSE: Final = 300.0
# Seconds without a change after a repair: no other program is changing the rules then.
_CALM: Final = 1.0


class Drift:
    """Counts repairs of the rules, and says when to check next: less often while another program keeps changing them.

    All times are seconds since the epoch.
    """

    def __init__(self, regular: float, now: float = 0.0) -> None:
        """regular: seconds from one check to the next, 0 for never. now: when the rules were last seen to be complete."""
        self.pause = regular
        self.repairs = 0
        self.away = 0.0
        self._regular = regular
        self._broken = False
        self._changed = 0.0
        self._complete = now
        self._away_since: float | None = None

    @property
    def in_a_fight(self) -> bool:
        """Whether another program changed the rules again after each of the latest repairs."""
        return self.pause > self._regular

    def complete(self, now: float) -> None:
        """All rules are in force."""
        if self._away_since is not None:
            self.away += now - self._away_since
            self._away_since = None
        self._complete = now
        if now - self._changed > _CALM:
            self._broken = False

    def incomplete(self) -> None:
        """A rule is not in force, and was at the latest call of `complete`."""
        if self._away_since is None:
            self._away_since = self._complete

    def checked(self, repaired: bool, now: float) -> None:
        """One check is done, and the rules are as they should be."""
        if repaired:
            self._wait_longer(now)
            self.repairs += 1
        else:
            self.pause = self._regular
            self._broken = False

    def failed(self, now: float) -> None:
        """One check is done, and the rules could not be read or repaired."""
        self._wait_longer(now)

    def _wait_longer(self, now: float) -> None:
        if self._broken:
            # As found by the last check, a moment ago.
            self.pause = min(self.pause * 2, max(LONGEST_PAUSE, self._regular))
        self._broken = True
        self._changed = now

    def every(self, regular: float) -> None:
        """Set another interval; what was counted stays."""
        self.pause = self._regular = regular
        self._broken = False

    def status(self, now: float, wrong: Sequence[str], unreadable: str) -> DriftStatus:
        """For the status. wrong: what a repair would change. unreadable: why the rules cannot be read."""
        since = self._away_since
        away = self.away + (0.0 if since is None else now - since)
        return DriftStatus(
            self.repairs,
            self._changed if self.repairs else None,
            self._regular,
            self.pause,
            tuple(wrong),
            unreadable,
            away,
            since,
        )
