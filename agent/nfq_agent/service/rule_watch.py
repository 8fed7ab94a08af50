"""When the rules are checked: at regular times, after a cheap look that shows a change, and when the kernel reports one."""

from __future__ import annotations

import selectors
from collections.abc import Callable

from nfq_agent.service.drift_check import GLANCE, DriftCheck
from nfq_agent.service.system import System


class RuleWatch:
    """Keeps the times of the checks in the supervisor's clocks."""

    def __init__(
        self,
        system: System,
        selector: selectors.BaseSelector,
        drift: DriftCheck,
        due: dict[Callable[[], None], float],
        after_check: Callable[[], None],
    ) -> None:
        """due: what is to be done, and when (monotonic seconds)."""
        self._system = system
        self._drift = drift
        self._due = due
        self._after_check = after_check
        self._events = system.ruleset_events()
        if self._events is not None:
            selector.register(self._events, selectors.EVENT_READ, self._on_ruleset_event)
        due[self.glance] = system.clock() + GLANCE
        self.schedule()

    @property
    def descriptors(self) -> list[int]:
        """No child may keep them."""
        return [] if self._events is None else [self._events.fileno()]

    def close(self) -> None:
        """Stop listening to the kernel."""
        if self._events is not None:
            self._events.close()

    def schedule(self) -> None:
        """Set the time of the next check."""
        self._due.pop(self.check, None)
        if self._drift.pause:
            self._due[self.check] = self._system.clock() + self._drift.pause

    def check(self) -> None:
        """Check the rules, and repair them."""
        self._drift.run(self._system.wall())
        self._after_check()
        self.schedule()

    def glance(self) -> None:
        """Take a cheap look, and check if it shows a change."""
        self._due[self.glance] = self._system.clock() + GLANCE
        self._drift.follow_groups(self._system.wall())
        if self._drift.pause and self._drift.glance(self._system.wall()):
            self.check()

    def _on_ruleset_event(self) -> None:
        """Check at the next cheap look: a transaction may be one of many."""
        assert self._events is not None
        self._events.drain()
        if self._drift.may_check_now:
            self._due[self.check] = min(self._due[self.check], self._due[self.glance])
