"""A table of an instance as the kernel has it: chains, rules with their counters, sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from nfq_agent.host.attributes import attributes
from nfq_agent.host.nftables import entries, layout, netlink
from nfq_agent.host.nftables.expressions import Expression, are_those, counted, decoded, encode
from nfq_agent.host.nftables.layout import AnySet
from nfq_agent.host.nftables.netlink import NftSocket, string, text
from nfq_agent.host.nftables.sets import DATATYPES, NamedSet, intervals_of
from nfq_agent.rules.model import VERDICTS, Extension, Family, Installed, Option, Rule, RuleError, TableState

OWNER, PERSIST = 2, 4
_KINDS: Final = {number: kind for kind, number in DATATYPES.items()}


@dataclass(slots=True)
class KernelRule:
    """One rule of ours. rule: with names of sets. handles: of the rules of nf_tables that it is made of."""

    rule: Rule
    handles: list[int]
    packets: int = 0
    bytes: int = 0


@dataclass(slots=True)
class Snapshot:
    """One table. port: its owner's netlink port, None without one. chains: every chain's rules by its name in the table.

    counted: packets by the number of the policy's rule, by the name of a map.
    """

    name: str
    flags: int
    port: int | None
    chains: dict[str, list[KernelRule]] = field(default_factory=dict)
    sets: dict[str, AnySet] = field(default_factory=dict)
    counted: dict[str, dict[int, int]] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether no rule is in it."""
        return not any(self.chains.values())


def read(connection: NftSocket, family: Family, name: str) -> Snapshot | None:
    """The table; None where there is none of that name. Raises OSError."""
    number = netlink.FAMILY_NUMBERS[family]
    for body in connection.dump(netlink.GET_TABLE, number):
        found = dict(attributes(body))
        if string(found[1]) == name:
            port = int.from_bytes(found[7], "big") if 7 in found else None
            snapshot = Snapshot(name, int.from_bytes(found.get(2, b""), "big"), port)
            break
    else:
        return None
    for body in connection.dump(netlink.GET_CHAIN, number):
        found = dict(attributes(body))
        if string(found[1]) == name:
            snapshot.chains[string(found[3])] = []
    for body in connection.dump(netlink.GET_SET, number, text(1, name)):
        found = dict(attributes(body))
        datatype = int.from_bytes(found.get(4, b""), "big")
        kind, kinds = _KINDS.get(datatype), entries.kinds_of_type(datatype)
        if string(found[1]) != name or not (kind or kinds):
            continue
        called = string(found[2])
        if kind is None:
            # NFTA_SET_DATA_TYPE: a map has one.
            several, packets = entries.read(called, kinds, 6 in found, _elements(connection, number, name, called))
            snapshot.sets[called], snapshot.counted[called] = several, packets
        else:
            snapshot.sets[called] = NamedSet(called, kind, intervals_of(tuple(_elements(connection, number, name, called)), kind))
    for chain, rules in _rules(connection, number, name).items():
        snapshot.chains.setdefault(chain, []).extend(_decoded(family, chain, rules))
    return snapshot


def names(connection: NftSocket, family: Family) -> frozenset[str]:
    """The names of all tables of a family. Raises OSError."""
    return frozenset(
        string(dict(attributes(body))[1]) for body in connection.dump(netlink.GET_TABLE, netlink.FAMILY_NUMBERS[family])
    )


def _elements(connection: NftSocket, number: int, table: str, name: str) -> Iterator[bytes]:
    for body in connection.dump(netlink.GET_ELEMENTS, number, text(1, table) + text(2, name)):
        for kind, value in attributes(body):
            if kind == 3:
                yield value


@dataclass(slots=True)
class _Raw:
    """A rule as the kernel has it. data: its user data."""

    handle: int
    data: bytes
    expressions: list[Expression]


def _rules(connection: NftSocket, number: int, table: str) -> Mapping[str, list[_Raw]]:
    found: dict[str, list[_Raw]] = {}
    for body in connection.dump(netlink.GET_RULE, number, text(1, table)):
        members = dict(attributes(body))
        if string(members[1]) != table:
            continue
        raw = _Raw(int.from_bytes(members[3], "big"), members.get(7, b""), decoded(members.get(4, b"")))
        found.setdefault(string(members[2]), []).append(raw)
    return found


def _decoded(family: Family, chain: str, raws: Sequence[_Raw]) -> Iterator[KernelRule]:
    """Rules of ours; a rule that differs from its own text is left out."""
    place = 0
    while place < len(raws):
        group = [raws[place]]
        while place + len(group) < len(raws) and _is_continued(raws[place + len(group)]):
            group.append(raws[place + len(group)])
        place += len(group)
        rule = _verified(family, chain, group)
        if rule is None:
            for each in group:
                yield KernelRule(_undecoded(chain, each), [each.handle], *counted(each.expressions))
        else:
            yield KernelRule(rule, [each.handle for each in group], *counted(part for each in group for part in each.expressions))


def _is_continued(raw: _Raw) -> bool:
    try:
        return layout.rule_of("-", raw.data) is None
    except (ValueError, UnicodeDecodeError):
        return False


def _verified(family: Family, chain: str, group: Sequence[_Raw]) -> Rule | None:
    try:
        table, own = layout.split_chain(chain)
        rule = layout.rule_of(own, group[0].data)
        if rule is None:
            return None
        native = any(each.name == "queue" for each in group[0].expressions)
        expected = encode(rule, family, lambda name: layout.full_name(table, name), native)
    except (ValueError, RuleError, UnicodeDecodeError):
        return None
    if len(expected) != len(group):
        return None
    complete = all(are_those(wanted, raw.expressions) for wanted, raw in zip(expected, group, strict=True))
    return rule if complete else None


def _undecoded(chain: str, raw: _Raw) -> Rule:
    import hashlib

    digest = hashlib.sha1(b"".join(each.packed for each in raw.expressions if each.name != "counter") + raw.data)
    return Rule(layout.split_chain(chain)[1], Extension("?", (Option("--undecoded", digest.hexdigest()[:16]),)))


def states(snapshots: Sequence[Snapshot], own_chains: frozenset[str]) -> dict[str, TableState]:
    """What the tables hold, by the name of the xtables table that each chain stands for."""
    chains: dict[str, dict[str, tuple[Installed, ...]]] = {}
    jumps: dict[str, list[Installed]] = {}
    for snapshot in snapshots:
        # A map that several rules share is counted once.
        left = dict(snapshot.counted)
        for full, rules in snapshot.chains.items():
            table, chain = layout.split_chain(full)
            installed = [_installed(rule, number, snapshot, left) for number, rule in enumerate(rules, 1)]
            chains.setdefault(table, {})
            if chain in own_chains:
                chains[table][chain] = (*chains[table].get(chain, ()), *installed)
            else:
                jumps.setdefault(table, []).extend(installed)
    return {table: TableState(inside, tuple(jumps.get(table, ()))) for table, inside in chains.items()}


def _installed(found: KernelRule, number: int, snapshot: Snapshot, left: dict[str, dict[int, int]]) -> Installed:
    packets = found.packets
    by_number: tuple[tuple[int, int], ...] = ()
    if found.rule.target.name == VERDICTS:
        counts = left.pop(found.rule.target.options[1].value[1:], {})
        packets, by_number = sum(counts.values()), tuple(sorted(counts.items()))
    try:
        rule = layout.without_sets(found.rule, snapshot.sets)
    except KeyError:
        rule = Rule(found.rule.chain, Extension("?", (Option("--undecoded", str(found.handles[0])),)))
    return Installed(rule, number, packets, found.bytes, found.handles[0], by_number)
