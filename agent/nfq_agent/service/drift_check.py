"""Checks that the rules in the kernel are those of the configuration, repairs them, and reads their counters on the way."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from nfq_agent.log import Log
from nfq_agent.rules.diff import Applied, Changes, Insert, render
from nfq_agent.rules.foreign import InFront
from nfq_agent.rules.group_tree import GroupTree
from nfq_agent.rules.groups import bound
from nfq_agent.rules.model import FAMILIES, Family, RuleError, Ruleset
from nfq_agent.service.drift import Drift
from nfq_agent.service.group_walk import GroupWalk
from nfq_agent.service.group_watch import GroupWatch
from nfq_agent.service.live_rules import ListedRule, LiveRules, StateByFamily, compare, listing, referenced_chains, states
from nfq_agent.service.meter import Meter
from nfq_agent.service.status import DriftStatus
from nfq_agent.values import duration_text

# Seconds from one cheap look to the next, and from one check to the next that a look or the kernel asks for.
GLANCE: Final = 0.25


class DriftCheck:
    """ruleset: the rules that have to be there. Times are seconds since the epoch."""

    def __init__(self, rules: LiveRules, meter: Meter, log: Log, seconds: float, walk: GroupWalk | None = None) -> None:
        """seconds: from one check to the next, 0 for never. walk: of the control groups; this host's unless given."""
        self.ruleset: Ruleset = {}
        self.in_front: list[InFront] = []
        self._rules = rules
        self._meter = meter
        self._log = log
        self._drift = Drift(seconds)
        self._groups = GroupWatch(log)
        self._walk = GroupWalk() if walk is None else walk
        self._sign: object = None
        self._wrong: list[str] = []
        self._unreadable = ""
        # A place that cannot be read is logged once.
        self._said: set[str] = set()
        self._unswept: tuple[str, ...] = ()

    @property
    def pause(self) -> float:
        """Seconds until the next check; 0 for never."""
        return self._drift.pause

    @property
    def may_check_now(self) -> bool:
        """Whether an early check is useful: not while another program changes the rules again and again."""
        return bool(self._drift.pause) and not self._drift.in_a_fight

    def status(self, now: float) -> DriftStatus:
        """For the status, as of the latest `look` or check."""
        status = self._drift.status(now, self._wrong, self._unreadable)
        return replace(status, waiting=self._groups.waiting(self.ruleset), late=dict(self._groups.late))

    def every(self, seconds: float) -> None:
        """Set another interval; the repairs so far stay counted."""
        self._drift.every(seconds)

    def wanted(self, ruleset: Ruleset, tree: GroupTree | None = None) -> Ruleset:
        """These rules as they have to be now, for the control groups that exist. tree: all of them, if they were just read."""
        self._walk.known = self._walk.now(ruleset) if tree is None else tree
        return bound(ruleset, self._groups.numbers(ruleset), self._walk.known)

    def _in_force(self) -> Ruleset:
        """These rules as they were put in. A group that has changed since is not drift: `follow_groups` sees to it."""
        return bound(self.ruleset, self._groups.last_numbers(self.ruleset), self._walk.known)

    def follow_groups(self, now: float) -> None:
        """Put in the rules of control groups that have appeared or were made again. Never raises RuleError: it is logged."""
        if self._groups.changed(self.ruleset):
            before = self._groups.known
            if not self._apply_for_groups():
                return
            self._groups.followed(self.ruleset, before, now)
        elif (found := self._walk.changed(self.ruleset)) is not None:
            # Most groups are of no concern to a rule.
            numbers = self._groups.last_numbers(self.ruleset)
            if bound(self.ruleset, numbers, found) != self._in_force():
                self._apply_for_groups(found)
            else:
                self._walk.known = found
        self._groups.looked(now)

    def _apply_for_groups(self, tree: GroupTree | None = None) -> bool:
        """Put in the rules for the groups that exist now; False where that is refused, which is logged."""
        known = self._walk.known
        try:
            self._put_in(self.wanted(self.ruleset, tree))
        except RuleError as error:
            self._walk.known = known
            self._log_once(f"the rules of a control group that has appeared could not be put in: {error}")
            return False
        return True

    def begin(self, state: StateByFamily, now: float) -> None:
        """The rules are in, and all there. state: as they were read back."""
        self.sweep()
        self._log_referenced(state)
        self._look_in_front(state)
        self._drift.complete(now)
        self._sign = self._rules.sign()

    def glance(self, now: float) -> bool:
        """Look cheaply whether rules of ours changed since the last check; True if a check is useful now."""
        if self._rules.sign() != self._sign:
            if self._drift.in_a_fight:
                self._drift.incomplete()
            return not self._drift.in_a_fight
        if not self._wrong:
            self._drift.complete(now)
        return False

    def look(self, now: float) -> list[ListedRule]:
        """Read the rules and compare them, and change nothing. Never raises RuleError: the status then says why."""
        try:
            state = self._rules.read()
        except RuleError as error:
            self._unreadable = str(error)
            return []
        self._take_in(state, now)
        return listing(state)

    def _take_in(self, state: StateByFamily, now: float) -> dict[Family, Changes]:
        self._unreadable = ""
        self._meter.read(listing(state), whole=False)
        changes = compare(self._in_force(), state)
        self._wrong = [f"{family} {line}" for family, each in changes.items() for line in _lines(each)]
        if any(isinstance(step, Insert) for each in changes.values() for steps in each.values() for step in steps):
            self._drift.incomplete()
        else:
            self._drift.complete(now)
        self._look_in_front(state)
        return changes

    def _look_in_front(self, state: StateByFamily) -> None:
        self.in_front = [each for family in FAMILIES for each in self._rules.host.in_front(family, state.get(family, {}))]

    def run(self, now: float) -> None:
        """Check once. Never raises RuleError: it is logged, and the next check tries again."""
        try:
            changes = self._take_in(self._rules.read(), now)
            if changes:
                self._repair(changes, now)
            self.sweep()
            self._drift.checked(bool(changes), now)
            self._sign = self._rules.sign()
        except RuleError as error:
            self._unreadable = str(error)
            self._drift.failed(now)
            self._log(f"the rules could not be checked: {error}; next in {duration_text(self._drift.pause)}", "error")
            return
        if changes and self._drift.in_a_fight:
            self._log(
                "another program changes this agent's rules again and again; the next check is in "
                f"{duration_text(self._drift.pause)}, and until then its traffic may pass uninspected: find that program and "
                'stop it, or use backend = "owned", whose rules no other program can change',
                "warning",
            )

    def apply(self, ruleset: Ruleset) -> dict[Family, Applied]:
        """Make the kernel's rules those of `ruleset`; what their counters counted until then is kept. Raises RuleError."""
        return self._put_in(self.wanted(ruleset))

    def _put_in(self, ruleset: Ruleset) -> dict[Family, Applied]:
        applied = self._rules.apply(ruleset)
        self._meter.read(listing({family: each.before for family, each in applied.items()}), whole=False)
        self._meter.read(listing(states(applied)))
        self._sign = self._rules.sign()
        self._log_referenced(states(applied))
        return applied

    def _log_referenced(self, state: StateByFamily) -> None:
        for line in referenced_chains(state):
            self._log_once(line)

    def _repair(self, changes: dict[Family, Changes], now: float) -> None:
        self._put_in(self._in_force())
        away = self._drift.status(now, (), "").away
        self._wrong = []
        self._drift.complete(now)
        count = sum(len(steps) for each in changes.values() for steps in each.values())
        self._log(
            f"another program changed this agent's rules; repaired in {count} places (since the start, rules were not in force "
            f"for {away:.1f} s at most)",
            "warning",
            repairs=self._drift.repairs + 1,
        )
        for family, each in changes.items():
            for line in _lines(each):
                self._log(f"repaired: {family} {line}", "debug")

    def sweep(self) -> None:
        """Remove rules of this instance that are anywhere but in the backend in use. Never raises RuleError: it is logged."""
        swept = self._rules.sweep()
        self._unswept = swept.unknown
        for line in swept.removed:
            self._log(line, "warning")
        for line in swept.accepted:
            self._log(line)
        for line in swept.unknown:
            self._log_once(line)

    def log_stopped(self) -> None:
        """Log at the end of a clean stop whether a rule of this instance is left, as far as the last `sweep` found out."""
        if self._unswept:
            self._log(
                "stopped: the rules in the backend's own tables are removed; whether one of this instance is left elsewhere is "
                f"unknown: {'; '.join(self._unswept)}; run `nfq-agent remove`",
                "warning",
            )
        else:
            self._log("stopped: no rule of this instance is left")

    def _log_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._log(line, "warning")


def _lines(changes: Changes) -> list[str]:
    return [f"{table} {line}" for table, steps in changes.items() for line in render({table: steps}) if not line.startswith("*")]
