"""The rules of one instance on this host, both families together: read, compare, put in, take out - all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nfq_agent.host.xtables.backend import RuleHost
from nfq_agent.rules.diff import Changes, Settled, diff
from nfq_agent.rules.leaving import fail_closed
from nfq_agent.rules.model import FAMILIES, Family, Installed, RuleError, Ruleset, TableRules, TableState

State = Mapping[Family, Mapping[str, TableState]]


@dataclass(frozen=True, slots=True)
class Found:
    """An installed rule and where it is."""

    family: Family
    table: str
    installed: Installed


class LiveRules:
    """What an instance has in the kernel, through one backend."""

    def __init__(self, host: RuleHost) -> None:
        self.host = host

    def read(self) -> State:
        """What the kernel has of this instance now. Raises RuleError."""
        return {family: self.host.read(family) for family in FAMILIES}

    def apply(self, ruleset: Ruleset) -> dict[Family, Settled]:
        """Make the kernel's rules those of `ruleset`, or leave them as they were. Raises RuleError."""
        done, errors = self._both(lambda family: ruleset.get(family, {}))
        if errors:
            self._put_back(done, errors[0])
            raise errors[0]
        return done

    def _both(self, desired: Callable[[Family], Mapping[str, TableRules]]) -> tuple[dict[Family, Settled], list[RuleError]]:
        """Both families at a time, each to its end whatever becomes of the other: what was done, and what failed."""
        under_way: dict[Family, Callable[[], Settled]] = {}
        done: dict[Family, Settled] = {}
        errors: list[RuleError] = []
        for family in FAMILIES:
            try:
                under_way[family] = self.host.begin(family, desired(family))
            except RuleError as error:
                errors.append(error)
        for family, finish in under_way.items():
            try:
                done[family] = finish()
            except RuleError as error:
                errors.append(error)
        return done, errors

    def _put_back(self, done: Mapping[Family, Settled], error: RuleError) -> None:
        for family, settled in done.items():
            try:
                self.host.apply(family, {name: state.as_rules() for name, state in settled.before.items()})
            except RuleError as second:
                raise RuleError(f"{error}; putting the {family} rules back failed too: {second}") from error

    def remove(self, keep_fail_closed: bool = False) -> dict[Family, Settled]:
        """Take away all rules of this instance; with `keep_fail_closed`, all but those that keep traffic out (no bypass).

        A family that fails does not keep the other from being cleaned. Raises RuleError.
        """
        done, errors = self._both(lambda family: fail_closed(self.host.read(family)) if keep_fail_closed else {})
        if errors:
            raise RuleError("; ".join(map(str, errors)))
        return done


def listing(state: State) -> list[Found]:
    """Every installed rule with its place, family by family, jumps before chains."""
    return [
        Found(family, table, installed)
        for family, tables in state.items()
        for table, there in tables.items()
        for installed in there.installed
    ]


def compare(ruleset: Ruleset, state: State) -> dict[Family, Changes]:
    """What `apply` would change, given what the kernel has; families without a change are left out."""
    changes = {family: diff(ruleset.get(family, {}), state.get(family, {})) for family in FAMILIES}
    return {family: found for family, found in changes.items() if found}
