"""The stop of a running agent, in order: its rules go, its queues run empty, its workers end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from nfq_agent.log import Log
from nfq_agent.rules.leaving import keep_for_draining
from nfq_agent.rules.model import RuleError
from nfq_agent.service.drift_check import DriftCheck
from nfq_agent.service.live_routes import LiveRoutes
from nfq_agent.service.live_rules import LiveRules, listing, states
from nfq_agent.service.system import Workers


@dataclass(frozen=True, slots=True)
class Stop:
    """What of a running agent is ended. drift: None before the first rules."""

    instance: str
    crew: Workers
    routes: LiveRoutes
    drift: DriftCheck | None
    log: Log

    def run(self, find: Callable[[], LiveRules] | None, failed: bool) -> bool:
        """Remove the rules, let the queues run empty, end the workers. True if all rules could be removed that should go.

        find: the rules that are to go; None where they are not ours to remove. It raises RuleError. failed: rules of queues with
        `bypass = false` stay, and block their traffic.
        """
        self.log("stop: removing the rules", "debug")
        clean, rules = True, None
        if find is not None:
            try:
                rules = find()
                self._remove(rules, failed)
            except RuleError as error:
                clean = False
                self.log(f"rules could not be removed: {error}; run `nfq-agent remove`", "error")
        self.log("stop: ending the workers once their queues are empty", "debug")
        self.crew.retire(self.crew.workers)
        self.crew.wait_for_leaving()
        if rules is not None:
            try:
                # Last: closing the backend may lose the packets that wait.
                rules.close()
            except RuleError as error:
                clean = False
                self.log(f"{error}; run `nfq-agent remove`", "error")
        return clean

    def _remove(self, rules: LiveRules, failed: bool) -> None:
        if self.crew.proxies and not failed and self.drift is not None:
            # Running connections of a proxy need rules too; those go last.
            with contextlib.suppress(RuleError):
                rules.apply(self.drift.wanted(keep_for_draining(self.drift.ruleset)))
            self.crew.retire(list(self.crew.proxies.values()))
            self.crew.wait_for_leaving()
        kept = listing(states(rules.remove(keep_fail_closed=failed)))
        rules.accepts = {}
        if self.drift is not None:
            self.drift.sweep()
        self.routes.apply()
        if failed and kept:
            self.log(
                f"{len(kept)} rules stay, for queues with bypass = false: their traffic is blocked until the next start, a clean "
                f"stop, or `nfq-agent remove --instance {self.instance}`",
                "warning",
            )
