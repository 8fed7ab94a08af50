"""Checks that the rules in the kernel are those of the configuration, repairs them, and reads their counters on the way."""

from __future__ import annotations

from typing import Final

from nfq_agent.log import Log
from nfq_agent.rules.diff import render
from nfq_agent.rules.model import RuleError, Ruleset
from nfq_agent.service.live_rules import LiveRules, compare, listing, states
from nfq_agent.service.meter import Drift, Meter
from nfq_agent.service.status import DriftStatus

# The longest pause, in seconds, between two checks while another program keeps changing the rules.
_LONGEST_PAUSE: Final = 300.0


class DriftCheck:
    """ruleset: the rules that have to be there."""

    def __init__(self, rules: LiveRules, meter: Meter, log: Log, seconds: float) -> None:
        """seconds: from one check to the next, 0 for never."""
        self.ruleset: Ruleset = {}
        self._rules = rules
        self._meter = meter
        self._log = log
        self._drift = Drift(seconds)
        # What could not be looked at is said once.
        self._said: set[str] = set()

    @property
    def pause(self) -> float:
        """Seconds until the next check; 0 for never."""
        return self._drift.pause

    @property
    def status(self) -> DriftStatus:
        """For the status."""
        return self._drift.status

    def every(self, seconds: float) -> None:
        """Set another interval; the repairs so far stay counted."""
        self._drift = self._drift.every(seconds)

    def run(self, now: float) -> None:
        """Check once. Never raises RuleError: it is logged, and the next check tries again. now: seconds since the epoch."""
        try:
            state = self._rules.read()
            self._meter.read(listing(state))
            changes = compare(self.ruleset, state)
            if changes:
                self._meter.read(listing(states(self._rules.apply(self.ruleset))))
                what = "; ".join(line for each in changes.values() for line in render(each) if not line.startswith("*"))
                self._log(
                    f"another program changed this agent's rules; repaired: {what}", "warning", repairs=self._drift.repairs + 1
                )
            self.sweep()
            self._drift.looked(bool(changes), now, _LONGEST_PAUSE)
        except RuleError as error:
            self._log(f"the rules could not be checked: {error}", "error")

    def sweep(self) -> None:
        """Remove rules of this instance that are anywhere but in the backend in use. Never raises RuleError: it is logged."""
        swept = self._rules.sweep()
        for line in swept.removed:
            self._log(line, "warning")
        for line in swept.unknown:
            if line not in self._said:
                self._said.add(line)
                self._log(line, "warning")
