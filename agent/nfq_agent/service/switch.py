"""The change of a running agent from one configuration to another, which is made as a whole or not at all."""

from __future__ import annotations

from dataclasses import dataclass

from nfq_agent.config.models import Config, ConfigError
from nfq_agent.log import Log
from nfq_agent.rules.diff import Applied
from nfq_agent.rules.leaving import keep_for_draining, merged
from nfq_agent.rules.model import Family, RuleError
from nfq_agent.service.drift_check import DriftCheck
from nfq_agent.service.live_routes import LiveRoutes
from nfq_agent.service.live_rules import LiveRules
from nfq_agent.service.planned import planned
from nfq_agent.service.reload import Step, carry_out, change_of, log_step, route_step, worker_steps
from nfq_agent.service.system import System, Workers
from nfq_agent.service.worker import Worker


def refuse_change(old: Config, new: Config) -> None:
    """Raise ConfigError where `new` differs in what cannot change while the agent runs."""
    for key in ("instance", "user", "backend"):
        if getattr(new.agent, key) != getattr(old.agent, key):
            raise ConfigError([f"agent.{key}: cannot change while the agent runs; allowed: a restart"])


@dataclass(frozen=True, slots=True)
class Switch:
    """What of a running agent is changed: its workers, its rules, its routes and its log."""

    crew: Workers
    rules: LiveRules
    routes: LiveRoutes
    drift: DriftCheck
    system: System
    log: Log

    def change(self, old: Config, new: Config, workers: list[Worker], uid: int) -> str:
        """Put `new` into force; says what has changed. workers: those of `new`. uid: of the agent's user.

        If it raises one of FAILURES or ConfigError, `old` is in force again.
        """
        rules, drift, log = self.rules, self.drift, self.log
        # A worker has a copy of the log, which it got at its start.
        relog = new.log != old.log
        change = change_of(self.crew.workers, workers, relog)
        ruleset = planned(new, uid, rules.host)
        # Rules that running connections of a proxy need go when those have ended.
        at_first = merged(ruleset, keep_for_draining(drift.ruleset))
        applied: dict[Family, Applied] = {}
        try:
            carry_out(
                [
                    *([log_step(log, lambda: self.system.open_log(new))] if relog else []),
                    *worker_steps(self.crew, change),
                    *([route_step(self.routes.apply, old, new)] if self.routes.needed(old, new) else []),
                    Step("the rules", lambda: applied.update(drift.apply(at_first)), lambda: drift.apply(drift.ruleset)),
                ],
                log,
            )
        except BaseException:
            # The rules were the last step: none leads to a queue of known flows that was opened for it.
            self.crew.close_leftovers()
            raise
        # From here on the new configuration is in force.
        edits = sum(len(steps) for each in applied.values() for steps in each.changes.values())
        self.crew.retire(change.gone)
        self.crew.close_leftovers()
        drift.ruleset = ruleset
        drift.every(new.agent.drift_check)
        if at_first != ruleset:
            self.crew.wait_for_leaving()
            try:
                drift.apply(ruleset)
            except RuleError as error:
                log(
                    f"rules of a proxy that has ended are left, and have no effect: {error}; the next drift check tries again",
                    "error",
                )
        try:
            self.routes.apply(new)
        except RuleError as error:
            log(
                f"routes for TPROXY that are not needed any more could not be removed: {error}; the next reload or the stop of "
                "this agent tries again",
                "error",
            )
        return f"reloaded: rules changed in {edits} places; workers: {change}"
