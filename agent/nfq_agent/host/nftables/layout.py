"""How the rules of one family are laid out in one table of nf_tables: chains, names of sets, and what each rule carries.

Each rule carries its tag as the comment that `nft` shows, and its own text, in which `@NAME` stands for the contents of a set. So
it is read back without the expressions being interpreted: they are made from the text once more, and compared.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

from nfq_agent.host.attributes import attribute
from nfq_agent.host.nftables import entries, sets
from nfq_agent.host.nftables.entries import EntrySet
from nfq_agent.host.nftables.netlink import nested, u32
from nfq_agent.host.nftables.sets import NamedSet
from nfq_agent.rules.entries import parsed, words
from nfq_agent.rules.model import AT_LEVEL, ENTRIES, VERDICTS, Extension, Family, Option, Rule, RuleError, TableRules

TABLE_PREFIX: Final = "nfq-agent-"
# No instance has a dot in its name.
CLOSED_SUFFIX: Final = ".closed"
# enum nf_inet_hooks
HOOKS: Final = {"PREROUTING": 0, "INPUT": 1, "FORWARD": 2, "OUTPUT": 3, "POSTROUTING": 4}
# enum nf_ip_hook_priorities; nat one before legacy and other nat at -100: the first DNAT wins, in any order of registration.
PRIORITIES: Final = {"raw": -300, "mangle": -150, "nat": -101, "filter": 0}

# libnftnl's NFTNL_UDATA_RULE_COMMENT, and two of our own, far from its numbers; it passes over what it does not know.
_COMMENT, _TEXT, _CONTINUED = 0, 200, 201
# NFT_USERDATA_MAXLEN
_USERDATA_BYTES: Final = 256
# What rule texts are made of: with it the longest fits into the user data. It must never change: rules that outlive an agent
# (bypass = false) are read by the next.
_DICTIONARY: Final = (
    b"--restore-mark--src-range--gid-owner-m cgroup --path system.slice/user.slice.service-m socket --transparent-m addrtype "
    b"! --dst-type LOCAL-j TPROXY --on-port --on-ip 0.0.0.0 :: --tproxy-mark 0x800/0x800-j CONNMARK --set-xmark "
    b"0x4e000000/0xff000000-m connmark --mark -m mark ! --mark 0x"
    b"-m iprange --dst-range @-m owner ! --uid-owner -p udp -m multiport --sports @--ports @"
    b"-i eth0 -o eth0 -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -m multiport --dports @tcp--j DROP-j RETURN"
    b"-j REDIRECT --to-ports 150-j NFQUEUE --queue-balance --queue-num 1 --queue-bypass --queue-cpu-fanout"
)


def table_name(instance: str, closed: bool) -> str:
    """The table of an instance. closed: the one that outlives its owner (bypass = false)."""
    return f"{TABLE_PREFIX}{instance}{CLOSED_SUFFIX if closed else ''}"


def instance_of_table(name: str) -> str | None:
    """The instance that a table is of; None for a foreign one."""
    return name.removeprefix(TABLE_PREFIX).removesuffix(CLOSED_SUFFIX) if name.startswith(TABLE_PREFIX) else None


def full_name(table: str, chain: str) -> str:
    """The name in our table of a chain of an xtables table: of a built-in one, it is the chain that hangs in the hook."""
    return f"{table}-{chain}"


def hook_attributes(table: str, hook: str) -> bytes:
    """NFTA_CHAIN_HOOK and NFTA_CHAIN_TYPE, by the names of the xtables table and its built-in chain."""
    kind = "nat" if table == "nat" else "route" if (table, hook) == ("mangle", "OUTPUT") else "filter"
    return nested(4, u32(1, HOOKS[hook]), u32(2, PRIORITIES[table] & 0xFFFFFFFF)) + attribute(7, kind.encode() + b"\0")


def split_chain(name: str) -> tuple[str, str]:
    """(xtables table, chain) of a chain's name here; a name of another form belongs to no table."""
    table, _, chain = name.partition("-")
    return (table, chain) if table in PRIORITIES and chain else ("", name)


AnySet = NamedSet | EntrySet
# The matches whose lists are sets.
_LISTS: Final = ("multiport", "iprange", AT_LEVEL)


@dataclass(frozen=True, slots=True)
class Layout:
    """The rules of a family with sets in place of lists. chains: by (xtables table, chain), built-in ones for the jumps."""

    chains: Mapping[tuple[str, str], tuple[Rule, ...]]
    sets: Mapping[str, AnySet]


def lay_out(desired: Mapping[str, TableRules], family: Family) -> Layout:
    """The layout of rules. The same rules give the same names; a rule with another list of ports keeps its set's name."""
    chains: dict[tuple[str, str], tuple[Rule, ...]] = {}
    named: dict[str, AnySet] = {}
    for table, rules in desired.items():
        for chain, inside in rules.chains.items():
            chains[table, chain] = tuple(_with_sets(rule, family, named) for rule in inside)
        for jump in rules.jumps:
            chains[table, jump.chain] = (*chains.get((table, jump.chain), ()), _with_sets(jump, family, named))
    return Layout(chains, named)


def _with_sets(rule: Rule, family: Family, named: dict[str, AnySet]) -> Rule:
    def put(match: Extension) -> Extension:
        if match.name in (ENTRIES, VERDICTS):
            return _with_entries(match, rule.tag.rpartition(":")[2], family, named)
        if match.name not in _LISTS:
            return match
        options = []
        for option in match.options:
            if match.name == AT_LEVEL and option.name == "--level":
                options.append(option)
                continue
            if match.name == AT_LEVEL:
                kind, stem, intervals = "cgroup", f"group.{match.options[0].value}", sets.groups(option.value)
            elif match.name == "multiport":
                kind, stem, intervals = "port", rule.protocol, sets.ports(option.value)
            else:
                kind = "ipv4" if family == "inet" else "ipv6"
                stem, intervals = option.name.strip("-").partition("-")[0], sets.addresses(option.value)
            name = _name(
                f"{stem}-{rule.tag.rpartition(':')[2]}", functools.partial(NamedSet, kind=kind, intervals=intervals), named
            )
            options.append(Option(option.name, f"@{name}", option.negated))
        return Extension(match.name, tuple(options))

    return replace(rule, matches=tuple(map(put, rule.matches)), target=put(rule.target))


def _with_entries(match: Extension, tag: str, family: Family, named: dict[str, AnySet]) -> Extension:
    of, option = match.options
    is_map = match.name == VERDICTS
    made = functools.partial(
        EntrySet, kinds=entries.kinds_of(of.value.split(","), family), intervals=parsed(option.value), is_map=is_map
    )
    # Sets of different fields never have the same name.
    name = _name(f"{'map' if is_map else 'set'}.{of.value.replace(',', '.')}-{tag}", made, named)
    return Extension(match.name, (of, option._replace(value=f"@{name}")))


def _name(stem: str, make: Callable[[str], AnySet], named: dict[str, AnySet]) -> str:
    number = 1
    while True:
        name = stem if number == 1 else f"{stem}-{number}"
        if named.setdefault(name, found := make(name)) == found:
            return name
        number += 1


def without_sets(rule: Rule, named: Mapping[str, AnySet]) -> Rule:
    """The rule with the contents of its sets. Raises KeyError for a set that is not there."""

    def put(match: Extension) -> Extension:
        options = []
        for option in match.options:
            if match.name in _LISTS and option.value.startswith("@"):
                found = named[option.value[1:]]
                assert isinstance(found, NamedSet)
                option = option._replace(value=_contents(found))
            elif match.name in (ENTRIES, VERDICTS) and option.value.startswith("@"):
                several = named[option.value[1:]]
                assert isinstance(several, EntrySet)
                family: Family = "inet6" if "ipv6" in several.kinds else "inet"
                option = option._replace(value=words(several.intervals, tuple(match.options[0].value.split(",")), family))
            options.append(option)
        return Extension(match.name, tuple(options))

    return replace(rule, matches=tuple(map(put, rule.matches)), target=put(rule.target))


def _contents(found: NamedSet) -> str:
    if found.kind == "cgroup":
        return sets.group_words(found.intervals)
    return sets.port_words(found.intervals) if found.kind == "port" else sets.address_words(found.intervals, found.kind)


def user_data(rule: Rule, part: int) -> bytes:
    """What a rule carries. part: 0, or more for a further rule of nf_tables that belongs to the same. Raises RuleError."""
    comment = rule.tag.encode() + b"\0"
    if part:
        body = bytes((_CONTINUED, 0))
    else:
        # Another comment than the tag stays (rules.groups).
        bare = replace(
            rule,
            matches=tuple(match for match in rule.matches if match != Extension("comment", (Option("--comment", rule.tag),))),
        )
        packing = zlib.compressobj(9, wbits=-15, zdict=_DICTIONARY)
        packed = packing.compress(bare.spec.encode()) + packing.flush()
        body = bytes((_TEXT, min(len(packed), 255))) + packed
    data = bytes((_COMMENT, len(comment))) + comment + body
    if len(data) > _USERDATA_BYTES:
        raise RuleError(f"a rule is too long for backend owned: {rule}")
    return data


def rule_of(chain: str, data: bytes) -> Rule | None:
    """The rule that user data tells, sets by name; None for the further part of the one before. Raises ValueError."""
    members = dict(_user_members(data))
    if _CONTINUED in members:
        return None
    if _TEXT not in members:
        raise ValueError("no text of ours")
    unpacking = zlib.decompressobj(wbits=-15, zdict=_DICTIONARY)
    try:
        spec = unpacking.decompress(members[_TEXT], 4096).decode()
    except zlib.error as error:
        raise ValueError(str(error)) from error
    rule = Rule.parse(f"-A {chain} {spec}")
    tag = members.get(_COMMENT, b"").rstrip(b"\0").decode()
    return replace(rule, matches=(*rule.matches, Extension("comment", (Option("--comment", tag),)))) if tag else rule


def comment_of(data: bytes) -> str:
    """The comment in the user data of any rule; empty without one."""
    return dict(_user_members(data)).get(_COMMENT, b"").split(b"\0")[0].decode(errors="replace")


def _user_members(data: bytes) -> Iterator[tuple[int, bytes]]:
    place = 0
    while place + 2 <= len(data):
        kind, size = data[place], data[place + 1]
        yield kind, data[place + 2 : place + 2 + size]
        place += 2 + size
