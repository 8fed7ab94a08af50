"""The rules of one instance on this host, both families together: read, compare, apply, remove - all or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nfq_agent.rules.diff import Applied, Changes, Delete, Insert, diff
from nfq_agent.rules.leaving import fail_closed
from nfq_agent.rules.model import ACCEPTED, FAMILIES, Family, Installed, Rule, RuleError, Ruleset, TableState

if TYPE_CHECKING:
    from nfq_agent.host.xtables.backend import RuleHost, RulePlace

StateByFamily = Mapping[Family, Mapping[str, TableState]]


@dataclass(frozen=True, slots=True)
class ListedRule:
    """An installed rule and where it is."""

    family: Family
    table: str
    installed: Installed


@dataclass(frozen=True, slots=True)
class Swept:
    """What one sweep did. removed: a line for each place. unknown: why a place could not be read or cleaned.

    accepted: a line for each place where rules that accept in front of a firewall were changed.
    """

    removed: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()


class LiveRules:
    """The rules of an instance in the kernel: of one backend, and left over in other places."""

    def __init__(self, host: RuleHost, others: Sequence[RulePlace] = ()) -> None:
        """others: every other place where rules of the instance may be, to be swept."""
        self.host = host
        # The rules that accept in hook INPUT, in front of firewalls in other places than the backend's own.
        self.accepts: Mapping[Family, Sequence[Rule]] = {}
        self._others = others

    def sweep(self) -> Swept:
        """Remove what is left of this instance in other places: saved and restored by others, or left by another backend.

        What accepts in front of a firewall (`accepts`) is put and kept there.
        """
        removed: list[str] = []
        unknown: list[str] = []
        accepted: list[str] = []
        for place in self._others:
            try:
                wanted = place.accepting(self.accepts)
                changes = compare(wanted, {family: place.read(family) for family in FAMILIES})
                if not changes:
                    continue
                place.apply_all({family: wanted.get(family, {}) for family in FAMILIES}, undo=False)
                place.close()
            except RuleError as error:
                unknown.append(f"rules of this instance in {place.name} tables cannot be read or changed: {error}")
                continue
            steps = [step for each in changes.values() for table in each.values() for step in table]
            put = sum(1 for step in steps if isinstance(step, Insert))
            gone = [step.rule for step in steps if isinstance(step, Delete)]
            accepting = sum(1 for rule in gone if ACCEPTED in rule.tag)
            if put or accepting:
                accepted.append(
                    "rules that accept what is redirected to a proxy, at the head of chains that drop in hook INPUT "
                    f"({place.name}): {put} inserted, {accepting} removed (accept_input)"
                )
            if len(gone) > accepting or len(steps) > put + len(gone):
                removed.append(
                    f"removed {len(gone) - accepting} rules of this instance from {place.name} tables, where they were left or "
                    "restored"
                )
        return Swept(tuple(removed), tuple(unknown), tuple(accepted))

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
        for table, found_rules in tables.items()
        for installed in found_rules.installed
    ]


def compare(ruleset: Ruleset, state: StateByFamily) -> dict[Family, Changes]:
    """What `apply` would change, given what the kernel has; families without a change are left out."""
    changes = {family: diff(ruleset.get(family, {}), state.get(family, {})) for family in FAMILIES}
    return {family: found for family, found in changes.items() if found}
