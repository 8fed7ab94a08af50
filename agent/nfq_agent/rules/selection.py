"""Which packets a `[rules.NAME]` selects in one hook, as matches: one for each rule that xtables, or nf_tables, needs for it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Network, IPv6Network, collapse_addresses
from typing import Final, NamedTuple

from nfq_agent.config.rule import INWARD, RuleConfig
from nfq_agent.config.selection import Identities
from nfq_agent.mark import Mark
from nfq_agent.rules.model import Extension, Family, Option, Rule, RuleError
from nfq_agent.values import Network, Ports

# xt_multiport holds 15 ports, and a range takes two places (XT_MULTI_PORTS).
_MULTIPORT_PLACES: Final = 15
SYN: Final = Extension("tcp", (Option("--tcp-flags", "FIN,SYN,RST,ACK SYN"),))
SYN_ACK: Final = Extension("tcp", (Option("--tcp-flags", "SYN,ACK SYN,ACK"),))
_TCP, _UDP, _ICMP, _ICMPV6 = 6, 17, 1, 58
_NAMES: Final = {_TCP: "tcp", _UDP: "udp"}


class Selected(NamedTuple):
    """One rule's conditions. matches: those on ports. tail: the others, which follow them."""

    protocol: str
    matches: tuple[Extension, ...]
    in_interface: str
    out_interface: str
    tail: tuple[Extension, ...]

    def rule(self, chain: str, target: Extension, comment: Extension) -> Rule:
        """The rule for these packets."""
        return Rule(chain, target, (*self.matches, *self.tail, comment), self.protocol, self.in_interface, self.out_interface)


def selected(name: str, rule: RuleConfig, hook: str, family: Family, lists: bool) -> Iterator[Selected]:
    """The conditions of every rule that this needs. lists: whether one rule takes a list of any length.

    Raises RuleError for what only the other backend can express.
    """
    if hook == "forward" and rule.interface and rule.role in ("server", "client"):
        yield from _forwarded(name, rule, family, lists)
        return
    for protocol, matches in _traffic(name, rule, rule.looks_at(hook), family, lists):
        for inward, outward in _interfaces(name, rule, hook, lists):
            for tail in _conditions(rule, family, lists):
                yield Selected(protocol, matches, inward, outward, tail)
        for port, _ in _bridge_ports(rule):
            for tail in _conditions(rule, family, lists):
                yield Selected(protocol, (*matches, port), "", "", tail)


def _forwarded(name: str, rule: RuleConfig, family: Family, lists: bool) -> Iterator[Selected]:
    """What is forwarded for a role: what leaves through the interface asks a server behind it, and what enters is its answer."""
    for inward in (True, False):
        direction = "--sports" if (rule.role == "server") == inward else "--dports"
        for protocol, matches in _traffic(name, rule, direction, family, lists):
            for pair in _interfaces(name, rule, "forward", lists):
                if bool(pair[0]) == inward:
                    for tail in _conditions(rule, family, lists):
                        yield Selected(protocol, matches, *pair, tail)
            for port, enters in _bridge_ports(rule):
                if enters == inward:
                    for tail in _conditions(rule, family, lists):
                        yield Selected(protocol, (*matches, port), "", "", tail)


# Protocols and ports.


def _traffic(
    name: str, rule: RuleConfig, direction: str, family: Family, lists: bool
) -> Iterator[tuple[str, tuple[Extension, ...]]]:
    excepted = {_TCP: _excluding(rule.not_tcp_ports, direction, lists), _UDP: _excluding(rule.not_udp_ports, direction, lists)}
    if rule.all:
        with_ports = [protocol for protocol, matches in excepted.items() if matches]
        if len(with_ports) > 1 and not lists:
            raise RuleError(
                f'rules.{name}: not_tcp_ports beside not_udp_ports with all = true needs backend = "owned", or two rules'
            )
        for protocol in with_ports:
            yield _NAMES[protocol], excepted[protocol]
        yield (f"! {','.join(_NAMES[protocol] for protocol in with_ports)}" if with_ports else ""), ()
    for protocol in sorted(set(rule.protocol or ())):
        # Neither exists in the other family.
        if protocol != (_ICMPV6 if family == "inet" else _ICMP):
            yield _NAMES.get(protocol, str(protocol)), excepted.get(protocol, ())
    head = (SYN,) if rule.tcp_syn else ()
    if rule.tcp_syn and not rule.tcp_ports:
        yield "tcp", (*head, *excepted[_TCP])
    for ports in port_lists(_without(rule.tcp_ports, rule.not_tcp_ports), lists):
        yield "tcp", (*head, Extension("multiport", (Option(direction, ports),)))
    for ports in port_lists(_without(rule.udp_ports, rule.not_udp_ports), lists):
        yield "udp", (Extension("multiport", (Option(direction, ports),)),)


def _excluding(ports: Iterable[Ports], direction: str, lists: bool) -> tuple[Extension, ...]:
    return tuple(Extension("multiport", (Option(direction, each, negated=True),)) for each in port_lists(ports, lists))


def _without(ports: Sequence[Ports], excepted: Iterable[Ports]) -> Sequence[Ports]:
    """The ports that are left when some are taken out."""
    if not excepted:
        return ports
    left = _merged(ports)
    for gone in excepted:
        pieces = [((each.first, min(each.last, gone.first - 1)), (max(each.first, gone.last + 1), each.last)) for each in left]
        left = [Ports(first, last) for pair in pieces for first, last in pair if first <= last]
    return left


def port_lists(ports: Iterable[Ports], lists: bool) -> Sequence[str]:
    """The ports in rising order, so that another order in the file changes nothing, in as many lists as the backend needs."""
    return _port_lists(tuple(ports), lists)


# Every hook of both families has the same lists, and there may be thousands of ports.
@functools.lru_cache(maxsize=16)
def _port_lists(ports: tuple[Ports, ...], lists: bool) -> tuple[str, ...]:
    merged = _merged(ports)
    room = len(merged) * 2 if lists else _MULTIPORT_PLACES
    made: list[str] = []
    group: list[str] = []
    places = 0
    for each in merged:
        size = 1 if each.first == each.last else 2
        if places + size > room:
            made.append(",".join(group))
            group, places = [], 0
        group.append(str(each))
        places += size
    return (*made, ",".join(group)) if group else ()


def _merged(ports: Iterable[Ports]) -> list[Ports]:
    """The same ports in rising order, none of them twice."""
    made: list[Ports] = []
    # By a key: the comparison of two Ports is a call for each, and there may be thousands.
    for each in sorted(ports, key=lambda each: (each.first, each.last)):
        if made and each.first <= made[-1].last:
            made[-1] = Ports(made[-1].first, max(made[-1].last, each.last))
        else:
            made.append(each)
    return made


# Interfaces.


def _interfaces(name: str, rule: RuleConfig, hook: str, lists: bool) -> Iterator[tuple[str, str]]:
    """(in, out) interface pairs; what is forwarded crosses an interface one way or the other."""
    if rule.not_interface:
        if len(rule.not_interface) > 1 and not lists:
            raise RuleError(f'rules.{name}: several interfaces in not_interface need backend = "owned"')
        wanted = f"! {','.join(map(_wildcard, sorted(rule.not_interface)))}"
        yield (wanted, wanted) if hook == "forward" else (wanted, "") if hook in INWARD else ("", wanted)
        return
    for wanted in map(_wildcard, sorted(set(rule.interface or ("",)))):
        if hook in INWARD or hook == "forward" or not wanted:
            yield wanted, ""
        if wanted and hook not in INWARD:
            yield "", wanted


def _wildcard(interface: str) -> str:
    """A configuration's "veth*" in the words of iptables(8): "veth+"."""
    return interface.replace("*", "+")


def _bridge_ports(rule: RuleConfig) -> Iterator[tuple[Extension, bool]]:
    """Matches of a bridged packet by its port of the bridge, and whether it enters there. -i and -o name the bridge itself
    (br_netfilter)."""
    for name in map(_wildcard, sorted(set(rule.interface or ()))) if rule.bridge else ():
        for option in ("--physdev-in", "--physdev-out"):
            yield Extension("physdev", (Option(option, name), Option("--physdev-is-bridged"))), option == "--physdev-in"


# Everything else.


def _conditions(rule: RuleConfig, family: Family, lists: bool) -> Iterator[tuple[Extension, ...]]:
    """The matches of each rule that any-of-these keys need, behind those that hold for all of them."""
    ranges = list(_ranges(rule, family, lists))
    if not all(ranges):
        # It names only networks of the other family.
        return
    choices: list[Sequence[tuple[Extension, ...]]] = [*ranges, _named("set", "--match-set", rule.set)]
    fixed = [*_excluded_ranges(rule, family, lists), *_each("set", "--match-set", rule.not_set)]
    if rule.mark is not None:
        fixed.append(marked(rule.mark))
    if rule.owner is not None:
        fixed.append(Extension("owner", (Option("--uid-owner", str(rule.owner_id)),)))
    choices += [_named("owner", "--uid-owner", _sorted(rule.uid)), _named("owner", "--gid-owner", _sorted(rule.gid))]
    choices.append(_named("cgroup", "--path", rule.cgroup))
    fixed += [
        *_each("owner", "--uid-owner", _sorted(rule.not_uid)),
        *_each("owner", "--gid-owner", _sorted(rule.not_gid)),
        *_each("cgroup", "--path", rule.not_cgroup),
    ]
    for chosen in itertools.product(*choices):
        yield (*itertools.chain.from_iterable(chosen), *fixed)


def marked(mark: Mark) -> Extension:
    """The match on a packet's mark, as iptables prints it: without a mask that takes every bit (libxt_mark.c, print_mark)."""
    return Extension("mark", (Option("--mark", f"{mark.value:#x}" if mark.mask == 0xFFFFFFFF else str(mark)),))


def _sorted(identities: Iterable[Identities] | None) -> list[str] | None:
    return None if identities is None else [str(each) for each in sorted(set(identities))]


def _named(match: str, option: str, values: Sequence[str] | None) -> Sequence[tuple[Extension, ...]]:
    """One of these values: a rule for each."""
    return [()] if values is None else [(Extension(match, (Option(option, value),)),) for value in dict.fromkeys(values)]


def _each(match: str, option: str, values: Sequence[str] | None) -> Iterator[Extension]:
    """None of these values: a match for each."""
    for value in dict.fromkeys(values or ()):
        yield Extension(match, (Option(option, value, negated=True),))


def _ranges(rule: RuleConfig, family: Family, lists: bool) -> Iterator[Sequence[tuple[Extension, ...]]]:
    """The choices of each of `src` and `dst`; empty where it has networks, and none of this family."""
    for key, networks in (("--src-range", rule.src), ("--dst-range", rule.dst)):
        if networks is not None:
            yield [(Extension("iprange", (Option(key, each),)),) for each in range_lists(networks, family, lists)]


def _excluded_ranges(rule: RuleConfig, family: Family, lists: bool) -> Iterator[Extension]:
    for key, networks in (("--src-range", rule.not_src), ("--dst-range", rule.not_dst)):
        for each in range_lists(networks or (), family, lists):
            yield Extension("iprange", (Option(key, each, negated=True),))


def range_lists(networks: Iterable[Network], family: Family, lists: bool) -> Iterator[str]:
    """The networks of a family as ranges of addresses, in as many lists as the backend needs."""
    networks = list(networks)
    v4 = collapse_addresses(each for each in networks if isinstance(each, IPv4Network))
    v6 = collapse_addresses(each for each in networks if isinstance(each, IPv6Network))
    ranges = [f"{network[0]}-{network[-1]}" for network in (v4 if family == "inet" else v6)]
    if lists and ranges:
        yield ",".join(ranges)
    else:
        yield from ranges
