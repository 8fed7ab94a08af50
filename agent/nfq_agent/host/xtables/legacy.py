"""The backend `legacy`: this instance's rules in the tables of legacy xtables.

Everything that touches a table (kernel.py) runs in a child process for one family: REDIRECT for IPv4 and then IPv6 in one process
fails, and libxtables' way of printing a rule takes over standard output for a moment.
"""

from __future__ import annotations

import functools
import math
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, Final

from nfq_agent.host.families import ADDRESS_FAMILIES, families
from nfq_agent.host.one_shot import OneShot, OneShotError
from nfq_agent.host.unreadable import unreadable
from nfq_agent.host.users import CAP_NET_ADMIN, has_capability
from nfq_agent.host.xtables import dropping
from nfq_agent.host.xtables.entries import FAMILY_NAMES
from nfq_agent.host.xtables.image import Image
from nfq_agent.host.xtables.in_front import in_front
from nfq_agent.host.xtables.kernel import Tables
from nfq_agent.host.xtables.lock import DEADLINE, LockError, release, xtables_lock
from nfq_agent.host.xtables.python_iptables import MODULES, NAMES_FILES, import_iptc, in_kernel
from nfq_agent.host.xtables.signs import Signs
from nfq_agent.rules.diff import Applied, apply_and_verify
from nfq_agent.rules.foreign import InFront
from nfq_agent.rules.model import (
    FAMILIES,
    TABLES,
    Family,
    Rule,
    RuleError,
    Ruleset,
    TableRules,
    TableState,
    instance_of,
    own_chains,
    tag_prefix,
)

# After a change that did not get the lock in time: seconds in which a change waits only briefly, and the seconds that it waits.
_SOON: Final = 30.0
_AGAIN_SECONDS: Final = 1.0


def tables_present(family: Family) -> frozenset[str] | None:
    """The tables that are present in this network namespace; None if this process may not know (the file is root's).

    Raises OSError if the list cannot be read now: rules may be there.
    """
    try:
        return frozenset(Path(NAMES_FILES[family]).read_text().split())
    except PermissionError:
        return None
    except FileNotFoundError:
        return frozenset()


def drops_in_input(family: Family, translated: bool) -> bool:
    """Whether the table filter drops in hook INPUT what no rule names. False where that cannot be read.

    translated: connections with a translated destination (capture = "redirect").
    """
    with suppress(OSError):
        if "filter" in (tables_present(family) or ()):
            return dropping.drops_in_input(family, Image(ADDRESS_FAMILIES[family], "filter"), translated)
    return False


def _loaded(family: Family) -> frozenset[str]:
    """The tables whose modules are loaded, if only for another network namespace; none where they are built in."""
    prefix = "iptable" if family == "inet" else "ip6table"
    return frozenset(table for table in TABLES if os.path.isdir(f"/sys/module/{prefix}_{table}"))


def _may_change() -> bool:
    """Whether this process may read and write rules. True where that is unknown: the kernel then refuses."""
    try:
        return has_capability(CAP_NET_ADMIN)
    except OSError:
        return True


class LegacyHost:
    """This instance's rules in the legacy tables. Its calls are short, and run in children of the caller."""

    name = "legacy"
    notice = ""
    lists = False
    # Rules of xtables depend on no descriptor.
    descriptors: tuple[int, ...] = ()

    def __init__(
        self, instance: str, lock: int | None = None, lock_seconds: float = DEADLINE, tables: Iterable[str] = ()
    ) -> None:
        """lock: a descriptor of the xtables lock, from a process that may open it. lock_seconds: how long to wait for it.

        tables: those that an earlier run wrote, for a process that may not know which tables are present.
        """
        self.instance = instance
        self._lock = lock
        self.lock_seconds = lock_seconds
        self._signs = Signs(instance)
        # When the lock was last not free in time (monotonic seconds).
        self._waited_in_vain = -math.inf
        # The tables to read if /proc does not list them: those that were written.
        self._known: dict[Family, set[str]] = {"inet": set(tables), "inet6": set(tables)}

    def present(self, family: Family) -> frozenset[str] | None:
        """The names of the tables that are present; None if this process may not know. Raises RuleError."""
        try:
            return tables_present(family)
        except OSError as error:
            raise unreadable(f"the list of tables ({FAMILY_NAMES[family]})", error) from error

    def read(self, family: Family) -> dict[str, TableState]:
        """What each table that is present holds of this instance. Raises RuleError."""
        found = dict.fromkeys(sorted(self._tables(family)), TableState())
        # A table in which nothing of ours is needs no python-iptables, and no child.
        if tables := frozenset(table for table in found if self._is_mentioned(family, table)):
            found |= self._one_shot(_read, family, self.instance, tables)
        return found

    def _is_mentioned(self, family: Family, table: str) -> bool:
        chains = frozenset(map(os.fsencode, own_chains(self.instance)))
        try:
            image = Image(socket.AF_INET if family == "inet" else socket.AF_INET6, table)
        except OSError as error:
            raise unreadable(f"table {table} ({FAMILY_NAMES[family]})", error) from error
        return image.mentions(chains, tag_prefix(self.instance).encode())

    @property
    def families(self) -> tuple[Family, ...]:
        """Those that the kernel speaks."""
        return families()

    def sign(self) -> object:
        """What the tables hold of this instance, without counters; read again only where the size of a table changed."""
        try:
            return [
                (family, table, self._signs.of(family, table)) for family in FAMILIES for table in sorted(self._tables(family))
            ]
        except (OSError, RuleError):
            return None

    def in_front(self, family: Family, found: Mapping[str, TableState]) -> list[InFront]:
        """Foreign rules that are asked before ours and may take their traffic. found: what `read` gave. Raises RuleError."""
        try:
            return [each for table, state in found.items() for each in in_front(family, table, state)]
        except OSError as error:
            raise unreadable(f"the {FAMILY_NAMES[family]} rules before ours", error) from error

    def accepting(self, accepts: Mapping[Family, Sequence[Rule]]) -> Ruleset:
        """Those of the rules of hook INPUT that belong here: where the table filter drops what it does not accept."""
        return {
            family: {"filter": TableRules({}, tuple(rules))}
            for family, rules in accepts.items()
            if drops_in_input(family, translated=False)
        }

    def instances(self, family: Family) -> frozenset[str]:
        """The instances that own chains."""
        tables = self._tables(family)
        found: frozenset[str] = self._one_shot(_instances, family, tables) if tables else frozenset()
        return found

    def apply(self, family: Family, desired: Mapping[str, TableRules]) -> Applied:
        """Make the rules of a family the desired ones, in every present table. Raises RuleError."""
        return self.begin(family, desired)()

    def apply_all(self, desired: Mapping[Family, Mapping[str, TableRules]], undo: bool = True) -> dict[Family, Applied]:
        """The same for several families at a time, each to its end, also if another fails. Raises RuleError.

        undo: if one fails, the others are put back.
        """
        under_way: dict[Family, Callable[[], Applied]] = {}
        done: dict[Family, Applied] = {}
        errors: list[RuleError] = []
        for family, rules in desired.items():
            try:
                under_way[family] = self.begin(family, rules)
            except RuleError as error:
                errors.append(error)
        for family, finish in under_way.items():
            try:
                done[family] = finish()
            except RuleError as error:
                errors.append(error)
        if errors and undo:
            self._put_back(done, errors[0])
            raise errors[0]
        if errors:
            raise RuleError("; ".join(dict.fromkeys(map(str, errors))))
        return done

    def _put_back(self, done: Mapping[Family, Applied], error: RuleError) -> None:
        for family, applied in done.items():
            if not applied.changes:
                continue
            try:
                self.apply(family, {name: state.as_rules() for name, state in applied.before.items()})
            except RuleError as second:
                raise RuleError(f"{error}; restoring the {family} rules failed too: {second}") from error

    def begin(self, family: Family, desired: Mapping[str, TableRules]) -> Callable[[], Applied]:
        """Begin `apply`; the returned function waits for its end. Raises RuleError like `apply`."""
        if family not in families():
            return Applied
        if not _may_change():
            # libiptc would print a line of its own.
            raise RuleError("CAP_NET_ADMIN is missing: without it no rule can be changed; run as root, or with that capability")
        wanted = {name for name, table in desired.items() if table.chains or table.jumps}
        tables = self._tables(family) | wanted
        if self.present(family) is None and not self._known[family]:
            # The first time it is not known what an earlier configuration left, and stale rules must go. A table that
            # becomes present is better than rules that stay; a table without its module has no rules.
            tables |= _loaded(family) if wanted else _loaded(family) or frozenset(TABLES)
        if not tables:
            return Applied
        if not in_kernel(family):
            raise RuleError(
                f"the kernel has no legacy xtables for {FAMILY_NAMES[family]}: modprobe {MODULES[family]}, leave that family out "
                'of the rules (family), or set backend = "owned"'
            )
        self._known[family] |= wanted
        arguments = family, self.instance, tables, dict(desired), self._lock, self._patience()
        if self._lock is not None:
            # Two children that share a descriptor share the lock: one after the other.
            return functools.partial(self._one_shot, _apply, *arguments)
        return functools.partial(self._finished, self._begun(_apply, *arguments))

    def close(self) -> None:
        """Nothing to release."""

    def _tables(self, family: Family) -> frozenset[str]:
        if family not in families():
            return frozenset()
        present = self.present(family)
        if present is None and not _may_change():
            raise RuleError(f"the {FAMILY_NAMES[family]} rules are shown to root only; run this as root (sudo)")
        return frozenset(self._known[family] if present is None else present & set(TABLES))

    def _patience(self) -> float:
        """How long to wait for the lock: only shortly if it was not free a moment ago. A stop has to end in time."""
        in_vain = time.monotonic() - self._waited_in_vain < _SOON
        return min(self.lock_seconds, _AGAIN_SECONDS) if in_vain else self.lock_seconds

    def _one_shot(self, function: Any, *args: Any) -> Any:
        return self._finished(self._begun(function, *args))

    def _begun(self, function: Any, *args: Any) -> OneShot[Any]:
        import_iptc()
        try:
            return OneShot(function, *args)
        except OSError as error:
            raise RuleError(f"legacy rules: {error}") from error

    def _finished(self, running: OneShot[Any]) -> Any:
        try:
            return running.result()
        except LockError:
            self._waited_in_vain = time.monotonic()
            raise
        except (OneShotError, OSError) as error:
            if self._lock is not None:
                # The child has ended, but a lock that it took on our descriptor is still held.
                release(self._lock)
            raise RuleError(f"legacy rules: {error}") from error


def _read(family: Family, instance: str, tables: frozenset[str]) -> dict[str, TableState]:
    return Tables(import_iptc(), family, instance, tables).read()


def _instances(family: Family, tables: frozenset[str]) -> frozenset[str]:
    session = Tables(import_iptc(), family, "", tables)
    names = (instance_of(os.fsdecode(chain)) for table in tables for chain in session.chains(table))
    return frozenset(name for name in names if name is not None)


def _apply(
    family: Family,
    instance: str,
    tables: frozenset[str],
    desired: Mapping[str, TableRules],
    lock: int | None,
    lock_seconds: float,
) -> Applied:
    session = Tables(import_iptc(), family, instance, tables)
    # Everything slow comes before the lock.
    for table in desired.values():
        for rule in table.rules:
            session.build(rule)

    def locked() -> AbstractContextManager[None]:
        session.make_room()
        return xtables_lock(lock, lock_seconds)

    if tables <= (tables_present(family) or frozenset()):
        # Other programs wait for the commit only.
        return apply_and_verify(session, desired, locked)
    # Reading makes a table present: not before we may write.
    with locked():
        return apply_and_verify(session, desired)
