"""Rules of an instance in the tables that iptables-nft writes to: from an earlier version, or saved as legacy and restored.

They are found by their tags and the names of their chains, whatever else is in those tables, and removed by their handles.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from nfq_agent.host.attributes import attributes
from nfq_agent.host.nftables import layout, netlink
from nfq_agent.host.nftables.netlink import Message, NftError, NftSocket, string, text, u64
from nfq_agent.host.unreadable import unreadable
from nfq_agent.rules.diff import Applied, Delete, DropChain
from nfq_agent.rules.model import (
    ACCEPTED,
    TABLES,
    Extension,
    Family,
    Installed,
    Option,
    Rule,
    RuleError,
    Ruleset,
    TableRules,
    TableState,
    instance_of,
    own_chains,
    tag_prefix,
)


@dataclass(frozen=True, slots=True)
class _Place:
    """A rule of nf_tables. tag: its comment, empty without one. target: the chain that it leads to, empty for none."""

    table: str
    chain: str
    handle: int
    tag: str
    target: str
    packets: int = 0
    bytes: int = 0


class NftLeftovers:
    """What an instance has in the tables of iptables-nft. It is a place to look at and to clean, not a backend."""

    name = "iptables-nft"

    def __init__(self, instance: str) -> None:
        self.instance = instance
        self._chains = own_chains(instance)
        self._tag = tag_prefix(instance)
        self._seen: dict[Family, tuple[int, dict[str, TableState]]] = {}

    def read(self, family: Family) -> dict[str, TableState]:
        """What each table holds of this instance; tables that hold nothing are left out. Raises RuleError."""
        try:
            with NftSocket() as connection:
                generation = connection.generation()
                seen = self._seen.get(family)
                if seen is None or seen[0] != generation:
                    # Read once for each change of the ruleset: it may be long.
                    seen = self._seen[family] = generation, self._read(connection, family)
                return seen[1]
        except OSError as error:
            raise unreadable("nf_tables", error) from error

    def _read(self, connection: NftSocket, family: Family) -> dict[str, TableState]:
        tables: dict[str, dict[str, list[Installed]]] = {}
        for table, chain in _chains(connection, family):
            tables.setdefault(table, {})[chain] = []
        for each in _places(connection, family):
            # What is accepted for a proxy stands there on purpose (accepting.py).
            if not each.tag.startswith(f"{self._tag}{ACCEPTED}"):
                rules = tables.setdefault(each.table, {}).setdefault(each.chain, [])
                rules.append(_installed(each, len(rules) + 1))
        found = {table: TableState.of(chains, self._chains, self._tag) for table, chains in tables.items()}
        return {table: state for table, state in found.items() if state != TableState()}

    def accepting(self, accepts: Mapping[Family, Sequence[Rule]]) -> Ruleset:  # noqa: ARG002  # see below
        """None: whatever is here is left over."""
        return {}

    def sign(self) -> object:
        """Always the same: the kernel reports changes (events.RulesetEvents)."""
        return None

    def instances(self, family: Family) -> frozenset[str]:
        """The instances that own chains. Raises RuleError."""
        try:
            with NftSocket() as connection:
                names = (instance_of(chain) for _, chain in _chains(connection, family))
                return frozenset(name for name in names if name is not None)
        except OSError as error:
            raise unreadable("nf_tables", error) from error

    def apply_all(  # one transaction is always all or nothing
        self,
        desired: Mapping[Family, Mapping[str, TableRules]],
        undo: bool = True,  # noqa: ARG002  # the contract's parameter
    ) -> dict[Family, Applied]:
        """Remove all of it, in one transaction: `desired` has to be empty. Raises RuleError."""
        if any(table.chains or table.jumps for rules in desired.values() for table in rules.values()):
            raise ValueError("no rule is ever written here")
        before = {family: self.read(family) for family in desired}
        if not any(before.values()):
            return {family: Applied() for family in desired}
        messages = [message for family, found in before.items() for message in _removal(family, found)]
        try:
            with NftSocket() as connection:
                connection.commit(messages)
        except NftError as error:
            raise RuleError(
                f"rules of instance {self.instance} in the tables of iptables-nft cannot be removed: {error}"
            ) from error
        except OSError as error:
            raise RuleError(f"nf_tables does not answer: {error.strerror or error}") from error
        return {family: Applied(_changes(found), found, self.read(family)) for family, found in before.items()}

    def close(self) -> None:
        """Nothing to release."""


def _removal(family: Family, found: Mapping[str, TableState]) -> Iterator[Message]:
    number = netlink.FAMILY_NUMBERS[family]
    for table, state in found.items():
        for each in state.installed:
            body = text(1, table) + text(2, each.rule.chain) + u64(3, each.handle)
            yield Message(netlink.DEL_RULE, number, body, 0, f"deleting a rule of chain {each.rule.chain}")
        for chain in state.chains:
            if chain not in state.referenced:
                yield Message(netlink.DEL_CHAIN, number, text(1, table) + text(3, chain), 0, f"deleting chain {chain}")


def _changes(found: Mapping[str, TableState]) -> dict[str, list[Delete | DropChain]]:
    return {
        table: [
            *(Delete(each.rule, each.number) for each in state.installed),
            *(DropChain(chain) for chain in state.chains if chain not in state.referenced),
        ]
        for table, state in found.items()
        if state.jumps or any(state.chains.values()) or state.chains.keys() - state.referenced
    }


def _chains(connection: NftSocket, family: Family) -> Iterator[tuple[str, str]]:
    for body in connection.dump(netlink.GET_CHAIN, netlink.FAMILY_NUMBERS[family]):
        found = dict(attributes(body))
        if (table := string(found[1])) in TABLES:
            yield table, string(found[3])


def _places(connection: NftSocket, family: Family) -> Iterator[_Place]:
    """Every rule that could be ours, or lead to a chain of ours: other rules are skipped by their bytes."""
    for table in TABLES:
        for body in connection.dump(netlink.GET_RULE, netlink.FAMILY_NUMBERS[family], text(1, table)):
            if b"nfq-agent:" not in body and b"NFQA-" not in body:
                continue
            members = dict(attributes(body))
            tag = layout.comment_of(members.get(7, b""))
            target = ""
            packets = size = 0
            for _, packed in attributes(members.get(4, b"")):
                parts = dict(attributes(packed))
                name, data = string(parts[1]), dict(attributes(parts.get(2, b"")))
                if name == "match" and string(data[1]) == "comment":
                    tag = data[3].split(b"\0")[0].decode(errors="replace")
                elif name == "counter":
                    size, packets = int.from_bytes(data[1], "big"), int.from_bytes(data[2], "big")
                elif name == "immediate" and int.from_bytes(data[1], "big") == 0:
                    verdict = dict(attributes(dict(attributes(data[2]))[2]))
                    target = string(verdict.get(2, b""))
            yield _Place(string(members[1]), string(members[2]), int.from_bytes(members[3], "big"), tag, target, packets, size)


def _installed(place: _Place, number: int) -> Installed:
    matches = (Extension("comment", (Option("--comment", place.tag),)),) if place.tag else ()
    target = Extension(place.target or "?")
    return Installed(Rule(place.chain, target, matches), number, place.packets, place.bytes, place.handle)
