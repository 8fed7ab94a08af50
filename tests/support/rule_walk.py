"""Walks planned rules with a packet, as the kernel does: the first rule of each table that takes it. Written from iptables(8)."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from nfq_agent.cli.question import Question
from nfq_agent.rules.model import TABLES, Extension, Rule, Ruleset, chain_name

_PORTS = frozenset((6, 17, 132, 136, 33))
_NUMBERS = {"tcp": 6, "udp": 17}


def taken(ruleset: Ruleset, instance: str, asked: Question) -> Iterator[tuple[str, str]]:
    """(table, name of the rule) for each table in which a rule of ours sends the packet to a queue or a proxy."""
    tables = ruleset.get("inet" if asked.version == 4 else "inet6", {})
    for table in sorted(tables, key=TABLES.index):
        for rule in tables[table].chains.get(chain_name(instance, asked.hook), ()):
            if rule.target.name in ("CONNMARK", "MARK", "") or not _holds(rule, asked):
                continue
            if rule.target.name != "RETURN":
                yield table, rule.tag.rpartition(":")[2]
            break


def _holds(rule: Rule, asked: Question) -> bool:
    protocol = rule.protocol.removeprefix("! ")
    if protocol:
        numbers = [_NUMBERS.get(each) or int(each) for each in protocol.split(",")]
        if (asked.number in numbers) == rule.protocol.startswith("! "):
            return False
    return (
        _through(rule.in_interface, asked.enters)
        and _through(rule.out_interface, asked.leaves)
        and all(_matches(match, asked) for match in rule.matches)
    )


def _through(wanted: str, name: str) -> bool:
    if not wanted:
        return True
    names = wanted.removeprefix("! ").split(",")
    found = any(name.startswith(each[:-1]) if each.endswith("+") else name == each for each in names)
    return found != wanted.startswith("! ")


def _matches(match: Extension, asked: Question) -> bool:
    if match.name == "comment":
        return True
    return all(_option(match.name, name, value, asked) != negated for name, value, negated in match.options)


def _option(match: str, name: str, value: str, asked: Question) -> bool:
    if match == "multiport":
        seen = {"--dports": (asked.dport,), "--sports": (asked.sport,), "--ports": (asked.dport, asked.sport)}[name]
        return asked.number in _PORTS and any(_in(port, each, ":") for port in seen for each in value.split(","))
    if match == "iprange":
        end = asked.source_address if name == "--src-range" else asked.destination_address
        return any(first <= end <= last for first, last in map(_ends, value.split(",")))  # type: ignore[operator]  # of one family
    if match == "tcp":
        return asked.number == 6
    if match == "owner":
        number = asked.uid if name == "--uid-owner" else asked.gid
        return number is not None and _in(number, value, "-")
    if match == "mark":
        wanted, _, mask = value.partition("/")
        return asked.mark & int(mask or "0xffffffff", 0) == int(wanted, 0)
    if match == "set":
        return value.partition(" ")[0] in asked.sets
    if match == "cgroup":
        return asked.cgroup == value or asked.cgroup.startswith(value + "/")
    if match == "physdev":
        return name == "--physdev-is-bridged" or _through(value, asked.enters if name == "--physdev-in" else asked.leaves)
    # No connection has a mark, a translated address, or an answer; no address is one of the host.
    assert match in ("connmark", "conntrack", "addrtype", "socket"), match
    return False


def _in(number: int, text: str, between: str) -> bool:
    first, _, last = text.partition(between)
    return int(first) <= number <= int(last or first)


def _ends(text: str) -> tuple[object, object]:
    first, _, last = text.partition("-")
    return ipaddress.ip_address(first), ipaddress.ip_address(last)
