"""The rules of one instance on this host, both families together: read, compare, apply, remove - all or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nfq_agent.host.xtables.backend import RuleHost, RulePlace
from nfq_agent.rules.diff import Applied, Changes, diff
from nfq_agent.rules.leaving import fail_closed
from nfq_agent.rules.model import FAMILIES, Family, Installed, RuleError, Ruleset, TableState

StateByFamily = Mapping[Family, Mapping[str, TableState]]


@dataclass(frozen=True, slots=True)
class ListedRule:
    """An installed rule and where it is."""

    family: Family
    table: str
    installed: Installed


@dataclass(frozen=True, slots=True)
class Swept:
    """What one sweep did. removed: a line for each place. unknown: why a place could not be read or cleaned."""

    removed: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


class LiveRules:
    """The rules of an instance in the kernel: of one backend, and left over in other places."""

    def __init__(self, host: RuleHost, others: Sequence[RulePlace] = ()) -> None:
        """others: every other place where rules of the instance may be, to be swept."""
        self.host = host
        self._others = others

    def sweep(self) -> Swept:
        """Remove what is left of this instance in other places: saved and restored by others, or left by another backend."""
        removed: list[str] = []
        unknown: list[str] = []
        for place in self._others:
            try:
                found = [each for family in FAMILIES for each in place.read(family).values()]
                if not any(
                    state.jumps or state.chains.keys() - state.referenced or any(state.chains.values()) for state in found
                ):
                    continue
                place.apply_all({family: {} for family in FAMILIES}, undo=False)
                place.close()
            except RuleError as error:
                unknown.append(f"rules of this instance may be left in {place.name} tables: {error}")
            else:
                count = sum(1 for state in found for _ in state.installed)
                removed.append(
                    f"removed {count} rules of this instance from {place.name} tables, where they were left or restored"
                )
        return Swept(tuple(removed), tuple(unknown))

    def sign(self) -> object:
        """A value that changes when rules of this instance change, as far as that is cheap to see. It makes no table present."""
        return (self.host.sign(), *(place.sign() for place in self._others))

    def read(self) -> StateByFamily:
        """What the kernel has of this instance now. Raises RuleError."""
        return {family: self.host.read(family) for family in FAMILIES}

    def apply(self, ruleset: Ruleset) -> dict[Family, Applied]:
        """Make the kernel's rules those of `ruleset`, or leave them as they were. Raises RuleError."""
        return self.host.apply_all({family: ruleset.get(family, {}) for family in FAMILIES})

    def remove(self, keep_fail_closed: bool = False) -> dict[Family, Applied]:
        """Remove all rules of this instance; with `keep_fail_closed`, all but those that block traffic (no bypass).

        If one family fails, the other is still cleaned. Raises RuleError.
        """
        return self.host.apply_all(
            {family: fail_closed(self.host.read(family)) if keep_fail_closed else {} for family in FAMILIES}, undo=False
        )

    def close(self) -> None:
        """Release what holds the rules, after `remove`, when the queues are empty. Raises RuleError."""
        self.host.close()


def states(applied: Mapping[Family, Applied]) -> StateByFamily:
    """What the kernel has after an `apply`."""
    return {family: each.after for family, each in applied.items()}


def referenced_chains(state: StateByFamily) -> list[str]:
    """A line for each chain of ours that cannot be deleted because a foreign rule jumps to it."""
    return [
        f"a rule that is not ours jumps to {chain} ({family} {table}); that chain cannot be deleted"
        for family, tables in state.items()
        for table, each in tables.items()
        for chain in sorted(each.referenced)
    ]


def listing(state: StateByFamily) -> list[ListedRule]:
    """Every installed rule with its place, family by family, jumps before chains."""
    return [
        ListedRule(family, table, installed)
        for family, tables in state.items()
        for table, there in tables.items()
        for installed in there.installed
    ]


def compare(ruleset: Ruleset, state: StateByFamily) -> dict[Family, Changes]:
    """What `apply` would change, given what the kernel has; families without a change are left out."""
    changes = {family: diff(ruleset.get(family, {}), state.get(family, {})) for family in FAMILIES}
    return {family: found for family, found in changes.items() if found}
