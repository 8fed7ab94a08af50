"""Rules of an instance that accept in front of a foreign firewall: at the head of chains of nf_tables that drop in hook INPUT.

A verdict of a table of our own ends the way through that table alone, so these rules are in the chains of others. They are found
by their tags, and no other rule is touched. In a chain of iptables-nft they have the form of its own rules: it could not list its
table otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from struct import Struct
from typing import Final, NamedTuple

from nfq_agent.host.attributes import attribute, attributes
from nfq_agent.host.nftables import layout, netlink
from nfq_agent.host.nftables.dropping import dropping_chains
from nfq_agent.host.nftables.expressions import Expression, are_those, counted, decoded, encode
from nfq_agent.host.nftables.neighbours import NUMBERS, HookChain
from nfq_agent.host.nftables.netlink import Message, NftError, NftSocket, nested, string, text, u32, u64
from nfq_agent.host.unreadable import unreadable
from nfq_agent.rules.diff import Applied, Delete, Insert, diff, render
from nfq_agent.rules.model import (
    ACCEPTED,
    Extension,
    Family,
    Installed,
    Option,
    Rule,
    RuleError,
    Ruleset,
    TableRules,
    TableState,
    tag,
)

# A chain of family inet takes the packets of both; its rules are listed with those of IPv4.
_NFT_FAMILIES: Final[Mapping[Family, tuple[str, ...]]] = {"inet": ("ip", "inet"), "inet6": ("ip6",)}
_TCP_NUMBER: Final = 6
# struct xt_tcp, xt_mark_mtinfo1 and xt_conntrack_mtinfo3 (linux/netfilter/), each padded as XT_ALIGN does it.
_TCP: Final = Struct("=4H4B4x")
_MARK: Final = Struct("=IIB7x")
_CONNTRACK: Final = Struct("=146xHHHH14x")
# XT_CONNTRACK_STATE, XT_CONNTRACK_STATE_DNAT
_STATE, _TRANSLATED = 1, 1 << 7
_LAST_PORT: Final = 65535


class _Found(NamedTuple):
    """A tagged rule. family: nf_tables' own name for it."""

    family: str
    table: str
    rule: Rule
    handle: int
    packets: int
    size: int


class AcceptRules:
    """What an instance accepts in chains of others. See xtables.backend.RulePlace."""

    name = "foreign nf_tables"

    def __init__(self, instance: str) -> None:
        self.instance = instance
        self._tag = tag(instance, ACCEPTED)
        # What was read, with the number of the ruleset: it may be long, and is read once for each change.
        self._seen: tuple[int, list[_Found]] | None = None
        self._asked: tuple[int, list[HookChain]] | None = None

    def read(self, family: Family) -> dict[str, TableState]:
        """The tagged rules by table, as `ip filter`. Raises RuleError."""
        tables: dict[str, list[Installed]] = {}
        for each in self._found():
            if each.family in _NFT_FAMILIES[family]:
                rules = tables.setdefault(f"{each.family} {each.table}", [])
                rules.append(Installed(each.rule, len(rules) + 1, each.packets, each.size, each.handle))
        return {table: TableState({}, tuple(rules)) for table, rules in tables.items()}

    def accepting(self, accepts: Mapping[Family, Sequence[Rule]]) -> Ruleset:
        """Where the rules of hook INPUT belong: in each chain of others that drops what it does not accept. Raises RuleError."""
        wanted: dict[Family, dict[str, TableRules]] = {}
        if not accepts:
            return wanted
        try:
            dropping = self._dropping()
        except OSError as error:
            raise unreadable("nf_tables", error) from error
        for chain in dropping:
            listed: Family = "inet6" if chain.family == "ip6" else "inet"
            chosen = [rule for family in (accepts if chain.family == "inet" else (listed,)) for rule in accepts.get(family, ())]
            table = wanted.setdefault(listed, {}).get(f"{chain.family} {chain.table}", TableRules())
            rules = tuple(replace(rule, chain=chain.chain) for rule in dict.fromkeys(chosen))
            wanted[listed][f"{chain.family} {chain.table}"] = TableRules({}, (*table.jumps, *rules))
        return wanted

    def sign(self) -> object:
        """Always the same: the kernel reports changes (events.RulesetEvents)."""
        return None

    def instances(self, family: Family) -> frozenset[str]:  # noqa: ARG002  # see below
        """None: these rules are named with those that need them."""
        return frozenset()

    def apply_all(  # one transaction is always all or nothing
        self,
        desired: Ruleset,
        undo: bool = True,  # noqa: ARG002  # the contract's parameter
    ) -> dict[Family, Applied]:
        """Make the tagged rules the desired ones, in one transaction. Raises RuleError."""
        before = {family: self.read(family) for family in desired}
        changes = {family: diff(rules, before[family]) for family, rules in desired.items()}
        if not any(changes.values()):
            return {family: Applied({}, state, state) for family, state in before.items()}
        messages: list[Message] = []
        for family, tables in changes.items():
            for table, steps in tables.items():
                handles = {each.number: each.handle for each in before[family].get(table, TableState()).jumps}
                for step in steps:
                    if isinstance(step, Delete):
                        messages.append(_deletion(table, step.rule.chain, handles[step.number]))
                    elif isinstance(step, Insert):
                        messages.append(_insertion(table, family, step.rule))
        try:
            with NftSocket() as connection:
                connection.commit(messages)
        except NftError as error:
            raise RuleError(f"rules of instance {self.instance} in chains of others cannot be changed: {error}") from error
        except OSError as error:
            raise RuleError(f"nf_tables does not answer: {error.strerror or error}") from error
        after = {family: self.read(family) for family in desired}
        if wrong := [line for family, rules in desired.items() for line in render(diff(rules, after[family]))]:
            raise RuleError("the kernel's rules differ from what was written:\n" + "\n".join(wrong))
        return {family: Applied(changes[family], before[family], after[family]) for family in desired}

    def close(self) -> None:
        """Nothing to release."""

    def _dropping(self) -> list[HookChain]:
        with NftSocket() as connection:
            generation = connection.generation()
        if self._asked is None or self._asked[0] != generation:
            self._asked = generation, dropping_chains(translated=False)
        return self._asked[1]

    def _found(self) -> list[_Found]:
        try:
            with NftSocket() as connection:
                generation = connection.generation()
                if self._seen is None or self._seen[0] != generation:
                    self._seen = generation, list(_tagged(connection, self._tag))
                return self._seen[1]
        except OSError as error:
            raise unreadable("nf_tables", error) from error


def _tagged(connection: NftSocket, wanted: str) -> Iterator[_Found]:
    for family, number in NUMBERS.items():
        for body in connection.dump(netlink.GET_RULE, number):
            if wanted.encode() not in body:
                continue
            members = dict(attributes(body))
            table, chain = string(members[1]), string(members[2])
            expressions = decoded(members.get(4, b""))
            rule = verified(family, table, chain, members.get(7, b""), expressions)
            if rule.tag.startswith(wanted):
                yield _Found(family, table, rule, int.from_bytes(members[3], "big"), *counted(expressions))


def verified(family: str, table: str, chain: str, data: bytes, found: Sequence[Expression]) -> Rule:
    """The rule that user data tells, if these are its expressions; else one with its tag that no configuration makes."""
    try:
        rule = layout.rule_of(chain, data)
        if rule is not None and are_those(expressions_of(family, table, rule), found):
            return rule
    except (ValueError, KeyError, RuleError):
        pass
    comments = [dict(attributes(each.data)) for each in found if each.name == "match"]
    names = [parts[3].split(b"\0")[0].decode(errors="replace") for parts in comments if string(parts[1]) == "comment"]
    comment = Extension("comment", (Option("--comment", names[0] if names else layout.comment_of(data)),))
    return Rule(chain, Extension("?"), (comment,))


def expressions_of(family: str, table: str, rule: Rule) -> list[Expression]:
    """The rule as a chain of that table needs it. family: nf_tables' own name. Raises RuleError."""
    bare = replace(rule, matches=tuple(each for each in rule.matches if each.name != "comment"))
    if not _is_of_iptables(family, table, rule.chain):
        (made,) = encode(bare, "inet6" if family == "ip6" else "inet", str, False)
        return made
    # The protocol is two expressions; the counter and the verdict end it.
    (frame,) = encode(replace(bare, matches=()), "inet", str, False)
    return [*frame[:2], *(_compatible(each) for each in bare.matches), *frame[2:]]


def _is_of_iptables(family: str, table: str, chain: str) -> bool:
    return family != "inet" and (table, chain) == ("filter", "INPUT")


def _compatible(match: Extension) -> Expression:
    """A match as the extension of xtables, through nft_compat."""
    (option,) = match.options
    if match.name == "tcp":
        revision, info = 0, _TCP.pack(0, _LAST_PORT, int(option.value), int(option.value), 0, 0, 0, 0)
    elif match.name == "conntrack":
        revision, info = 3, _CONNTRACK.pack(_STATE, 0, _TRANSLATED, 0)
    else:
        value, _, mask = option.value.partition("/")
        revision, info = 1, _MARK.pack(int(value, 0), int(mask or "0xffffffff", 0), 0)
    return Expression("match", text(1, match.name) + u32(2, revision) + attribute(3, info))


def _insertion(table: str, family: Family, rule: Rule) -> Message:
    """At the head of the chain: a new rule goes there unless it is appended."""
    nft_family, _, name = table.partition(" ")
    expressions = nested(4, *(each.packed for each in expressions_of(nft_family, name, rule)))
    # NFTA_RULE_COMPAT: what an extension of xtables has to know about its rule.
    compatible = nested(5, u32(1, _TCP_NUMBER), u32(2, 0)) if _is_of_iptables(nft_family, name, rule.chain) else b""
    body = text(1, name) + text(2, rule.chain) + expressions + compatible + attribute(7, layout.user_data(rule, 0))
    return Message(netlink.NEW_RULE, NUMBERS[nft_family], body, netlink.CREATE, f"a rule of {family} chain {rule.chain}")


def _deletion(table: str, chain: str, handle: int) -> Message:
    nft_family, _, name = table.partition(" ")
    body = text(1, name) + text(2, chain) + u64(3, handle)
    return Message(netlink.DEL_RULE, NUMBERS[nft_family], body, 0, f"deleting a rule of chain {chain}")
