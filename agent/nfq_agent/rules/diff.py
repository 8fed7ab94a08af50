"""The difference between the desired and the installed rules, and `apply_and_verify`, which applies it.

Values in, values out; the only effects are the two calls of the `Session` it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

from nfq_agent.edits import edits
from nfq_agent.rules.model import Installed, Rule, RuleError, TableRules, TableState


@dataclass(frozen=True, slots=True)
class NewChain:
    """Make an empty chain of our own."""

    chain: str


@dataclass(frozen=True, slots=True)
class Insert:
    """Put a rule at a place in its chain, counted from 1, in the chain as the changes before it left it."""

    rule: Rule
    number: int


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete the rule at a place, counted likewise. `rule` is the rule there, for the text."""

    rule: Rule
    number: int


@dataclass(frozen=True, slots=True)
class DropChain:
    """Delete a chain of our own that is empty by then."""

    chain: str


class Busy(RuleError):
    """Another program changed the table between reading and committing; nothing was written, and reading again may help."""


Change = NewChain | Insert | Delete | DropChain
Changes = Mapping[str, Sequence[Change]]


class Session(Protocol):
    """One family's tables for the length of one change, with the xtables lock held where the backend has one."""

    def read(self) -> Mapping[str, TableState]:
        """What every table that is present holds of this instance."""

    def commit(self, table: str, changes: Sequence[Change]) -> None:
        """Carry out the changes of one table in one commit, all or none.

        Raises Busy for as long as trying again makes sense, else RuleError.
        """


@dataclass(frozen=True, slots=True)
class Applied:
    """What `apply_and_verify` did: the changes by table (empty if nothing differed), the state before and the state now."""

    changes: Changes = field(default_factory=dict)
    before: Mapping[str, TableState] = field(default_factory=dict)
    after: Mapping[str, TableState] = field(default_factory=dict)


def diff(desired: Mapping[str, TableRules], actual: Mapping[str, TableState]) -> dict[str, list[Change]]:
    """The changes by table that lead from `actual` to `desired`, in an order that is always valid; no entry without a change."""
    changes: dict[str, list[Change]] = {}
    for table in sorted({*desired, *actual}):
        if found := list(_table_changes(desired.get(table, TableRules()), actual.get(table, TableState()))):
            changes[table] = found
    return changes


def _table_changes(desired: TableRules, actual: TableState) -> Iterator[Change]:
    for chain, rules in desired.chains.items():
        if chain not in actual.chains:
            yield NewChain(chain)
        yield from _chain_changes(rules, actual.chains.get(chain, ()))
    yield from _jump_changes(desired.jumps, actual.jumps)
    surplus = [chain for chain in actual.chains if chain not in desired.chains]
    for chain in surplus:
        yield from _chain_changes((), actual.chains[chain])
    # All are empty before the first goes: a removed rule may have jumped from one to another.
    for chain in surplus:
        if chain not in actual.referenced:
            yield DropChain(chain)


def _chain_changes(desired: Sequence[Rule], actual: Sequence[Installed]) -> Iterator[Change]:
    """Edits of an own chain: rules that stay are not touched, and keep their counters."""
    present = [found.rule for found in actual]
    # From the end, so that the numbers of earlier rules stay valid.
    for kind, start, end, first, last in reversed(edits(present, desired)):
        if kind in ("delete", "replace"):
            for index in reversed(range(start, end)):
                yield Delete(present[index], index + 1)
        if kind in ("insert", "replace"):
            for place, rule in enumerate(desired[first:last]):
                yield Insert(rule, start + 1 + place)


def _jump_changes(desired: Sequence[Rule], actual: Sequence[Installed]) -> Iterator[Change]:
    """Jumps go to the head of a built-in chain. Its place among foreign rules is not corrected later."""
    wanted = list(desired)
    surplus: list[Installed] = []
    for found in actual:
        if found.rule in wanted:
            wanted.remove(found.rule)
        else:
            surplus.append(found)
    # From the end of each chain, and before anything is inserted above.
    for found in sorted(surplus, key=lambda each: (each.rule.chain, each.number), reverse=True):
        yield Delete(found.rule, found.number)
    for rule in reversed(wanted):
        yield Insert(rule, 1)


def apply_and_verify(
    session: Session, desired: Mapping[str, TableRules], lock: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Applied:
    """Make the kernel's rules the desired ones: read, compare, commit table by table where they differ, read again.

    lock: taken for the commits, which answer Busy if the rules have changed since they were read. Raises RuleError if a commit
    fails, or if
    the rules still differ when read under the lock; the rules from before are restored then.
    """
    before = session.read()
    changes = diff(desired, before)
    if not changes:
        return Applied({}, before, before)
    # In this order: without the lock nothing was changed, and there is nothing to restore.
    with lock(), _reverted_on_failure(session, before):
        _carry_out(session, desired, changes)
    with _reverted_on_failure(session, before, lock):
        after = session.read()
        if diff(desired, after):
            # Changed by another program, or written wrongly?
            with lock():
                _carry_out(session, desired, diff(desired, session.read()))
                after = session.read()
            if rest := diff(desired, after):
                raise RuleError("the kernel's rules differ from what was written:\n" + "\n".join(render(rest)))
    return Applied(changes, before, after)


@contextmanager
def _reverted_on_failure(
    session: Session, before: Mapping[str, TableState], lock: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Iterator[None]:
    """Restore the rules from before if the body raises RuleError, which is raised again."""
    try:
        yield
    except RuleError as error:
        try:
            former = {name: state.as_rules() for name, state in before.items()}
            with lock():
                _carry_out(session, former, diff(former, session.read()))
        except RuleError as second:
            raise RuleError(f"{error}; restoring the former rules failed too: {second}") from error
        raise


def _carry_out(session: Session, desired: Mapping[str, TableRules], changes: Changes) -> None:
    while changes:
        try:
            for table, steps in _ordered(changes, desired):
                session.commit(table, steps)
        except Busy:
            changes = diff(desired, session.read())
        else:
            return


def _ordered(changes: Changes, desired: Mapping[str, TableRules]) -> Iterator[tuple[str, Sequence[Change]]]:
    """Tables in which rules are only deleted come first."""
    for table in sorted(changes, key=lambda name: (name in desired, name)):
        yield table, changes[table]


def render(changes: Changes) -> Iterator[str]:
    """The changes as text: `+` and `-` before the text of `iptables`, under a line for each table."""
    for table, steps in changes.items():
        yield f"*{table}"
        for step in steps:
            match step:
                case NewChain(chain):
                    yield f"+ -N {chain}"
                case DropChain(chain):
                    yield f"- -X {chain}"
                case Insert(rule, _):
                    yield f"+ {rule}"
                case Delete(rule, _):
                    yield f"- {rule}"
