"""The messages that turn one table of nf_tables, as it was read, into a layout. Rules that stay keep their counters."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Final

from nfq_agent.edits import edits
from nfq_agent.host.attributes import attribute
from nfq_agent.host.nftables import layout, netlink
from nfq_agent.host.nftables.expressions import Expression, encode
from nfq_agent.host.nftables.layout import HOOKS, AnySet, Layout
from nfq_agent.host.nftables.netlink import Message, nested, text, u32, u64
from nfq_agent.host.nftables.snapshot import KernelRule, Snapshot
from nfq_agent.rules.model import Family, Rule

_ACCEPT: Final = 1


class Edit:
    """Changes of one table, for one batch. A chain that hangs in a hook is made where it is missing, and never deleted."""

    def __init__(self, family: Family, table: str, before: Snapshot | None, native_queue: bool) -> None:
        """before: the table as it is, None if it is to be made."""
        self._family: Family = family
        self._number = netlink.FAMILY_NUMBERS[family]
        self._table = table
        self._before = before or Snapshot(table, 0, None)
        self._native_queue = native_queue
        # NFTA_RULE_ID: by which a rule of this batch is named while it has no handle.
        self._ids = itertools.count(1)

    def own(self, flags: int) -> Message:
        """Make the table, or become its owner. flags: NFTA_TABLE_FLAGS."""
        return self._message(netlink.NEW_TABLE, text(1, self._table) + u32(2, flags), netlink.CREATE, "the table")

    def delete(self) -> Message:
        """Delete the table with all that is in it."""
        return self._message(netlink.DEL_TABLE, text(1, self._table), 0, "deleting the table")

    def to(self, wanted: Layout) -> Iterator[Message]:
        """Everything but the table itself."""
        yield from self._sets_before(wanted)
        chains = self._before.chains
        for table, chain in wanted.chains:
            if layout.full_name(table, chain) not in chains:
                yield self._new_chain(table, chain)
        # Our own chains are filled before anything leads to them; the order is not visible in a transaction, but an error names
        # the right rule.
        for table, chain in sorted(wanted.chains, key=lambda each: each[1] in HOOKS):
            yield from self._chain(layout.full_name(table, chain), wanted.chains[table, chain])
        surplus = [name for name in chains if layout.split_chain(name) not in wanted.chains]
        for name in surplus:
            for found in chains[name]:
                yield from self._delete(name, found)
        for name in surplus:
            if layout.split_chain(name)[1] not in HOOKS:
                yield self._message(netlink.DEL_CHAIN, text(1, self._table) + text(3, name), 0, f"deleting chain {name}")
        for name in self._before.sets.keys() - wanted.sets.keys():
            yield self._message(netlink.DEL_SET, text(1, self._table) + text(2, name), 0, f"deleting set {name}")

    def _message(self, kind: int, body: bytes, flags: int, what: str) -> Message:
        return Message(kind, self._number, body, flags, f"{what} ({self._family} {self._table})")

    # Sets.

    def _sets_before(self, wanted: Layout) -> Iterator[Message]:
        for number, (name, each) in enumerate(wanted.sets.items(), 1):
            old = self._before.sets.get(name)
            if old is None:
                yield self._message(
                    netlink.NEW_SET, text(1, self._table) + each.declaration(number), netlink.CREATE, f"set {name}"
                )
                yield from self._elements(netlink.NEW_ELEMENTS, each, each.intervals)
            else:
                before, after = set(old.intervals), set(each.intervals)
                yield from self._elements(netlink.DEL_ELEMENTS, each, sorted(before - after))
                yield from self._elements(netlink.NEW_ELEMENTS, each, sorted(after - before))

    def _elements(self, kind: int, each: AnySet, intervals: Sequence[Any]) -> Iterator[Message]:
        """intervals: of the kind that the set has."""
        flags = netlink.CREATE if kind == netlink.NEW_ELEMENTS else 0
        for elements in each.element_lists(intervals):
            yield self._message(kind, text(1, self._table) + text(2, each.name) + elements, flags, f"elements of set {each.name}")

    # Chains and rules.

    def _new_chain(self, table: str, chain: str) -> Message:
        name = layout.full_name(table, chain)
        body = text(1, self._table) + text(3, name)
        if chain in HOOKS:
            body += layout.hook_attributes(table, chain) + u32(5, _ACCEPT)
        return self._message(netlink.NEW_CHAIN, body, netlink.CREATE, f"chain {name}")

    def _chain(self, name: str, wanted: Sequence[Rule]) -> Iterator[Message]:
        present = self._before.chains.get(name, [])
        # The rule before the next one: none at the head of the chain.
        behind = b""
        for kind, start, end, first, last in edits([found.rule for found in present], wanted):
            if kind == "equal":
                behind = u64(6, present[end - 1].handles[-1])
                continue
            for found in present[start:end]:
                yield from self._delete(name, found)
            for rule in wanted[first:last]:
                for part, expressions in enumerate(self._encoded(name, rule)):
                    number = next(self._ids)
                    yield self._new_rule(name, rule, part, expressions, number, behind)
                    behind = u32(10, number)

    def _encoded(self, name: str, rule: Rule) -> list[list[Expression]]:
        table, _ = layout.split_chain(name)
        return encode(rule, self._family, lambda chain: layout.full_name(table, chain), self._native_queue)

    def _new_rule(
        self, chain: str, rule: Rule, part: int, expressions: Sequence[Expression], number: int, behind: bytes
    ) -> Message:
        body = (
            text(1, self._table)
            + text(2, chain)
            + nested(4, *(each.packed for each in expressions))
            + behind
            + attribute(7, layout.user_data(rule, part))
            + u32(9, number)
        )
        flags = netlink.CREATE | (netlink.APPEND if behind else 0)
        return self._message(netlink.NEW_RULE, body, flags, f"the rule {rule}")

    def _delete(self, chain: str, found: KernelRule) -> Iterator[Message]:
        for handle in found.handles:
            body = text(1, self._table) + text(2, chain) + u64(3, handle)
            yield self._message(netlink.DEL_RULE, body, 0, f"deleting the rule {found.rule}")
