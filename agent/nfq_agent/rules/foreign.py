"""Foreign rules that affect ours, as values: those that precede ours, and those that change marks. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from nfq_agent.rules.model import Family, Rule

# (first, last), both included.
PortRange = tuple[int, int]

_COMMANDS: Final = {"inet": "iptables-legacy", "inet6": "ip6tables-legacy"}
_PROTOCOLS: Final = {"tcp": 6, "udp": 17, "udplite": 136, "sctp": 132, "dccp": 33}


@dataclass(frozen=True, slots=True)
class InFront:
    """A foreign rule that is asked before a jump of ours and may keep packets from it.

    chain, number: the rule of the built-in chain, counted from 1. target: what happens to the packets. packets: that the rule,
    or what it leads to, took since it was made; not all of them are packets that our rules select.
    """

    family: Family
    table: str
    chain: str
    number: int
    target: str
    packets: int

    @property
    def text(self) -> str:
        """As text."""
        return f"rule {self.number} of {self.chain} in table {self.table} ({self.family}, {self.target})"

    @property
    def command(self) -> str:
        """The command that lists it."""
        return f"{_COMMANDS[self.family]} -t {self.table} -nvL {self.chain} {self.number}"


@dataclass(frozen=True, slots=True)
class Reach:
    """The packets that a rule selects, as far as that is easy to see. None and an empty string stand for anything."""

    protocol: int | None = None
    in_interface: str = ""
    out_interface: str = ""
    source: tuple[PortRange, ...] | None = None
    destination: tuple[PortRange, ...] | None = None
    either: tuple[PortRange, ...] | None = None

    def may_meet(self, other: Reach) -> bool:
        """Whether one packet may be selected by both. What is unknown counts as selected."""
        if None not in (self.protocol, other.protocol) and self.protocol != other.protocol:
            return False
        if not (_same(self.in_interface, other.in_interface) and _same(self.out_interface, other.out_interface)):
            return False
        return all(
            _meet(mine, theirs)
            for mine, theirs in (
                (self.source, other.source),
                (self.destination, other.destination),
                (self.either, _together(other)),
                (_together(self), other.either),
            )
        )


def reach_of(rule: Rule) -> Reach:
    """What a rule of ours selects."""
    ports: dict[str, tuple[PortRange, ...]] = {}
    for match in rule.matches:
        if match.name == "multiport":
            ports.update((option.name, _intervals(option.value)) for option in match.options if not option.negated)
    return Reach(
        _number(rule.protocol),
        "" if rule.in_interface.startswith("! ") else rule.in_interface,
        "" if rule.out_interface.startswith("! ") else rule.out_interface,
        ports.get("--sports"),
        ports.get("--dports"),
        ports.get("--ports"),
    )


def _number(protocol: str) -> int | None:
    if protocol.isdecimal():
        return int(protocol)
    return _PROTOCOLS.get(protocol)


def _intervals(words: str) -> tuple[PortRange, ...]:
    pairs = (word.partition(":") for word in words.split(","))
    return tuple((int(first), int(last or first)) for first, _, last in pairs)


def _same(mine: str, theirs: str) -> bool:
    if not mine or not theirs:
        return True
    if mine.endswith("+") or theirs.endswith("+"):
        stems = mine.rstrip("+"), theirs.rstrip("+")
        return stems[0].startswith(stems[1]) or stems[1].startswith(stems[0])
    return mine == theirs


def _together(each: Reach) -> tuple[PortRange, ...] | None:
    known = [found for found in (each.source, each.destination, each.either) if found is not None]
    return tuple(interval for found in known for interval in found) if known else None


def _meet(mine: tuple[PortRange, ...] | None, theirs: tuple[PortRange, ...] | None) -> bool:
    return mine is None or theirs is None or any(a <= d and c <= b for a, b in mine for c, d in theirs)
