"""The backend `owned`: the rules of one instance in an nf_tables table that belongs to this process.

No other process can change such a table, and the kernel removes it with the last descriptor of the socket that made it
(NFT_TABLE_F_OWNER, Linux 5.12). With queues that fail closed the table stays when its owner is gone, and the next start becomes
its owner (NFT_TABLE_F_PERSIST, Linux 6.9). A chain in a hook is only ever deleted at the end: whenever one leaves its hook, the
kernel
drops every packet that waits in a queue.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Final

from nfq_agent.host.families import families
from nfq_agent.host.nftables import layout, snapshot
from nfq_agent.host.nftables.edit import Edit
from nfq_agent.host.nftables.netlink import Message, NftError, NftSocket
from nfq_agent.host.nftables.snapshot import OWNER, PERSIST, Snapshot
from nfq_agent.host.nftables.support import Support, probe
from nfq_agent.host.unreadable import unreadable
from nfq_agent.rules.diff import Applied, diff, render
from nfq_agent.rules.foreign import InFront
from nfq_agent.rules.model import FAMILIES, Family, Rule, RuleError, Ruleset, TableRules, TableState, own_chains

_TRIES: Final = 5
# What the kernel answers where a table without an owner changed since it was read.
_CHANGED: Final = (errno.ENOENT, errno.EEXIST, errno.EBUSY)

Desired = Mapping[Family, Mapping[str, TableRules]]
# By whether a table outlives its owner.
Snapshots = Mapping[bool, Snapshot]


class OwnedHost:
    """This instance's rules in a table of its own. See xtables.backend.RuleHost."""

    name = "owned"
    lists = True

    def __init__(self, instance: str, notice: str = "", inherited: int | None = None, persist: bool = False) -> None:
        """inherited: the descriptor of the owner's socket, from the process that this one takes over from.

        persist: the rules outlive this process though no queue fails closed (for `apply`, which does not serve).
        """
        self.instance = instance
        self.notice = notice
        # nf_tables has no such lock: its transactions are atomic.
        self.lock_seconds = 0.0
        self._persist = persist
        self._connection = None if inherited is None else NftSocket(inherited)
        self._own_chains = own_chains(instance)
        self._known_support: Support | None = None

    # Reading.

    def read(self, family: Family) -> dict[str, TableState]:
        """What each table holds of this instance. Raises RuleError."""
        return self._states(self._found(family))

    @property
    def families(self) -> tuple[Family, ...]:
        """Those that the kernel speaks."""
        return families()

    def sign(self) -> object:
        """Always the same: the kernel reports changes (events.RulesetEvents), and lets no other process change an owned table."""
        return None

    def present(self, family: Family) -> frozenset[str]:
        """The xtables tables whose hooks are in use. Raises RuleError."""
        return frozenset(self.read(family))

    def in_front(self, family: Family, found: Mapping[str, TableState]) -> list[InFront]:  # noqa: ARG002  # see below
        """None: a verdict in another table ends the way through that table only."""
        return []

    def accepting(self, accepts: Mapping[Family, Sequence[Rule]]) -> Ruleset:  # noqa: ARG002  # see below
        """None: a verdict in a table of ours ends the way through that table only."""
        return {}

    def instances(self, family: Family) -> frozenset[str]:
        """The instances that have a table. Raises RuleError."""
        try:
            with NftSocket() as connection:
                found = (layout.instance_of_table(name) for name in snapshot.names(connection, family))
                return frozenset(name for name in found if name is not None)
        except OSError as error:
            raise unreadable("nf_tables", error) from error

    def _found(self, family: Family) -> dict[bool, Snapshot]:
        found = {}
        try:
            with NftSocket() as connection:
                for closed in (False, True):
                    each = snapshot.read(connection, family, layout.table_name(self.instance, closed))
                    if each is not None:
                        found[closed] = each
        except OSError as error:
            raise unreadable("nf_tables", error) from error
        return found

    def _states(self, found: Snapshots) -> dict[str, TableState]:
        return snapshot.states(list(found.values()), self._own_chains)

    # Writing.

    @property
    def descriptors(self) -> list[int]:
        """What holds the rules: they stay as long as a process keeps it open."""
        return [] if self._connection is None else [self._connection.fileno()]

    def apply(self, family: Family, desired: Mapping[str, TableRules]) -> Applied:
        """Make the rules of a family the desired ones. Raises RuleError."""
        return self.apply_all({family: desired})[family]

    def apply_all(self, desired: Desired, undo: bool = True) -> dict[Family, Applied]:  # noqa: ARG002  # it is always undone
        """Make the rules of these families the desired ones in one transaction. Raises RuleError, and nothing is changed then."""
        tries = 0
        while True:
            before = {family: self._found(family) for family in desired}
            tries += 1
            try:
                return self._change(desired, before)
            except NftError as error:
                if error.errno not in _CHANGED or tries == _TRIES:
                    raise RuleError(self._refusal(error, before)) from error
            except OSError as error:
                raise RuleError(f"nf_tables does not answer: {error.strerror or error}") from error

    def _change(self, desired: Desired, before: Mapping[Family, Snapshots]) -> dict[Family, Applied]:
        states = {family: self._states(found) for family, found in before.items()}
        changes = {family: diff(rules, states[family]) for family, rules in desired.items()}
        closed = self._persist or any(map(_fails_closed, desired.values()))
        if not any(changes.values()) and all(self._in_force(before[family], rules, closed) for family, rules in desired.items()):
            return {family: Applied({}, state, state) for family, state in states.items()}
        messages = [
            message for family, rules in desired.items() for message in self._messages(family, rules, before[family], closed)
        ]
        if messages:
            self._owner().commit(messages)
        after = {family: self._states(self._found(family)) for family in desired}
        wrong = [line for family, rules in desired.items() for line in render(diff(rules, after[family]))]
        if wrong:
            self._put_back(states)
            raise RuleError("the kernel's rules differ from what was written:\n" + "\n".join(wrong))
        return {family: Applied(changes[family], states[family], after[family]) for family in desired}

    def _in_force(self, found: Snapshots, rules: Mapping[str, TableRules], closed: bool) -> bool:
        """Whether these rules are in the right table, and this process owns it."""
        if not any(table.chains for table in rules.values()):
            return True
        snapshot = found.get(closed)
        port = None if self._connection is None else self._connection.port
        if snapshot is None or not self._flags(closed) & OWNER:
            return snapshot is not None
        # The owner's socket has a port; a table without an owner has none.
        return port is not None and snapshot.port == port

    def _messages(self, family: Family, rules: Mapping[str, TableRules], found: Snapshots, closed: bool) -> Iterator[Message]:
        wanted = layout.lay_out(rules, family)
        nothing = layout.Layout({}, {})
        native = bool(wanted.chains) and self._support().native_queue
        edit = Edit(family, layout.table_name(self.instance, closed), found.get(closed), native)
        if wanted.chains:
            yield edit.own(self._flags(closed))
        if wanted.chains or closed in found:
            yield from edit.to(wanted)
        if (other := found.get(not closed)) is not None:
            yield from Edit(family, other.name, other, native).to(nothing)

    def _put_back(self, states: Mapping[Family, Mapping[str, TableState]]) -> None:
        with suppress(OSError, RuleError):
            former = {family: {name: each.as_rules() for name, each in tables.items()} for family, tables in states.items()}
            closed = self._persist or any(map(_fails_closed, former.values()))
            messages = [each for family in former for each in self._messages(family, former[family], self._found(family), closed)]
            self._owner().commit(messages)

    def _owner(self) -> NftSocket:
        if self._connection is None:
            self._connection = NftSocket()
        return self._connection

    def _flags(self, closed: bool) -> int:
        if not closed:
            return OWNER
        # Without an owner it stays as well, but others can change it.
        return OWNER | PERSIST if self._support().persist else 0

    def _support(self) -> Support:
        if self._known_support is None:
            self._known_support = probe()
        if self._known_support.problem is not None:
            raise RuleError(f"backend owned cannot be used: {self._known_support.problem}")
        return self._known_support

    def _refusal(self, error: NftError, before: Mapping[Family, Snapshots]) -> str:
        mine = None if self._connection is None else self._connection.port
        ports = {found.port for each in before.values() for found in each.values()} - {None, mine}
        if error.errno == errno.EPERM and ports:
            return (
                f"the nf_tables table of instance {self.instance} belongs to another running process (netlink port "
                f"{', '.join(map(str, ports))}); stop that process first"
            )
        if error.errno == errno.EPERM:
            return "nf_tables refuses the change: CAP_NET_ADMIN is missing; start as root, or with that capability"
        return f"nf_tables refuses {error.filename or 'the change'}: {error.strerror}"

    def close(self) -> None:
        """Release the rules: delete every table in which no rule is left, then close the socket. Raises RuleError.

        Not before the queues are empty: the kernel drops the packets that wait. A table that fails closed and still has rules
        stays, without an owner.
        """
        try:
            messages = [
                Edit(family, each.name, each, False).delete()
                for family in FAMILIES
                for each in self._found(family).values()
                if each.is_empty
            ]
            if messages:
                self._owner().commit(messages)
        except NftError as error:
            # A table of another process must not be deleted.
            if error.errno != errno.EPERM:
                raise RuleError(f"the table of instance {self.instance} could not be deleted: {error.strerror}") from error
        except OSError as error:
            raise RuleError(f"nf_tables does not answer: {error.strerror or error}") from error
        finally:
            if self._connection is not None:
                self._connection.close()
                self._connection = None


def _fails_closed(rules: Mapping[str, TableRules]) -> bool:
    """Whether a rule drops its traffic while no process serves its queue."""
    return any(
        rule.target.name == "NFQUEUE" and not any(option.name == "--queue-bypass" for option in rule.target.options)
        for table in rules.values()
        for rule in table.rules
    )
