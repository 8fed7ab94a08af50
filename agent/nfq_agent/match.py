"""Conditions on a packet, many at a time: which of a list of condition sets does it meet?

Every kind of condition is a table from what a packet has to the sets that allow it, the sets being the bits of an int. A
packet costs one look-up for each kind in use and an AND; how many sets or networks there are hardly matters.
"""

from __future__ import annotations

import contextlib
import fnmatch
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from nfq_agent.element import Options
from nfq_agent.geography import NOWHERE, Geography, asn, country
from nfq_agent.interfaces import Interfaces
from nfq_agent.networks import NetworkMap
from nfq_agent.packet import INWARD, OUTWARD, PROTOCOL_NAMES, FiveTuple, Hook, Packet
from nfq_agent.protocols import dot
from nfq_agent.protocols.known import PROTOCOLS
from nfq_agent.values import NetworkField, Ports, listed, lookups, network, one_or_more, ports_of_text

# Protocols found in the data of a flow (`flow.facts["protocol"]`), in contrast to those of the IP header.
APPLICATIONS: Final = tuple(protocol.name for protocol in PROTOCOLS if protocol is not dot.PROTOCOL)
# Conditions on the place of an address.
PLACES: Final = ("src_country", "dst_country", "src_asn", "dst_asn")
_NUMBERS: Final = {name: number for number, name in PROTOCOL_NAMES.items()}
_DIRECTIONS: Final = {"in": INWARD, "out": OUTWARD}


def _port(value: object) -> Ports:
    return Ports.parse(value, lowest=0)


def _protocol(value: object) -> int | str:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255:
        return value
    if isinstance(value, str):
        if value in APPLICATIONS:
            return value
        if value in _NUMBERS:
            return _NUMBERS[value]
    names = ", ".join((*_NUMBERS, *APPLICATIONS))
    raise ValueError(f"{value!r} is not a known protocol; allowed: 0 to 255, {names}")


def _user(value: object, info: ValidationInfo) -> int:
    return _identity(value, lambda name: lookups(info.context).uid(name), "user")


def _group(value: object, info: ValidationInfo) -> int:
    return _identity(value, lambda name: lookups(info.context).gid(name), "group")


def _identity(value: object, number_of: Callable[[str], int], kind: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 0xFFFFFFFE:
        return value
    if isinstance(value, str):
        with contextlib.suppress(KeyError):
            return number_of(value)
    raise ValueError(f"no {kind} {value!r} on this host; allowed: an existing {kind}'s name, or its number")


def _interface(value: object) -> str:
    if isinstance(value, str) and re.fullmatch(r"[^\s/!]{1,15}", value):
        return value
    raise ValueError(
        f'{value!r} is not a valid interface name; allowed: up to 15 characters, as in "eth0", or a pattern as "veth*"'
    )


_LIST: Final = BeforeValidator(one_or_more)
_SOME: Final = Field(min_length=1, strict=False)
Networks = Annotated[tuple[NetworkField, ...], BeforeValidator(listed(network)), _SOME]
PortRanges = Annotated[tuple[Annotated[Ports, BeforeValidator(_port)], ...], BeforeValidator(listed(ports_of_text)), _SOME]
Protocols = Annotated[tuple[Annotated[int | str, BeforeValidator(_protocol)], ...], _LIST, _SOME]
Users = Annotated[tuple[Annotated[int, BeforeValidator(_user)], ...], _LIST, _SOME]
Groups = Annotated[tuple[Annotated[int, BeforeValidator(_group)], ...], _LIST, _SOME]
InterfaceNames = Annotated[tuple[Annotated[str, BeforeValidator(_interface)], ...], _LIST, _SOME]
Countries = Annotated[tuple[Annotated[str, BeforeValidator(country)], ...], BeforeValidator(listed(country)), _SOME]
Systems = Annotated[tuple[Annotated[int, BeforeValidator(asn)], ...], BeforeValidator(listed(asn)), _SOME]
Hooks = Annotated[tuple[Literal["prerouting", "input", "forward", "output", "postrouting"], ...], _LIST, _SOME]


class Conditions(Options):
    """Conditions that must all hold; within one of them, any of its values. A condition that is left out always holds.

    An interface is met where a packet comes in or goes out by it. A later fragment shows no ports and meets no condition on
    them; a uid or gid is met where the kernel reports it, which is for outgoing packets. A country or an autonomous system is
    met by addresses that a database has; one that no database has meets none.
    """

    src: Networks | None = None
    dst: Networks | None = None
    sport: PortRanges | None = None
    dport: PortRanges | None = None
    protocol: Protocols | None = None
    src_country: Countries | None = None
    dst_country: Countries | None = None
    src_asn: Systems | None = None
    dst_asn: Systems | None = None
    uid: Users | None = None
    gid: Groups | None = None
    interface: InterfaceNames | None = None
    direction: Literal["in", "out"] | None = None
    hook: Hooks | None = None

    @model_validator(mode="after")
    def _hold_together(self) -> Self:
        if len({type(each) for each in self.protocol or ()}) > 1:
            raise ValueError("protocol mixes those of the IP header with those of the data; allowed: a rule for each kind")
        if _hooks(self) == ():
            raise ValueError(f"no packet goes {self.direction} in the hook named; allowed: one of hook and direction")
        return self

    @property
    def applications(self) -> tuple[str, ...]:
        """The protocols that only the data shows."""
        return tuple(each for each in self.protocol or () if isinstance(each, str))


class Match:
    """Tells which of some condition sets a packet meets, as bits.

    name_of: the name of an interface by its index, as socket.if_indextoname gives it. geography: where addresses belong; without
    it no address belongs anywhere. by_process: some set asks for a uid or gid.
    """

    def __init__(self, rules: Sequence[Conditions], name_of: Callable[[int], str], geography: Geography | None = None) -> None:
        self._all = (1 << len(rules)) - 1
        self._src = _networks(rules, "src")
        self._dst = _networks(rules, "dst")
        self._sport = _ports(rules, "sport")
        self._dport = _ports(rules, "dport")
        self._protocol = _values(rules, lambda rule: tuple(p for p in rule.protocol or () if isinstance(p, int)) or None)
        self._uid = _values(rules, lambda rule: rule.uid)
        self._gid = _values(rules, lambda rule: rule.gid)
        self._hook = _values(rules, _hooks)
        self._geography = geography
        self._places = [
            (end, kind, table) for end in ("dst", "src") for kind in ("country", "asn") if (table := _places(rules, end, kind))
        ]
        self._named = [(rule.interface, 1 << place) for place, rule in enumerate(rules) if rule.interface]
        self._unnamed = self._all & ~sum(bit for _, bit in self._named)
        self._by_name: dict[str, int] = {"": self._unnamed}
        self._interfaces = Interfaces(name_of)
        self.by_process = self._uid is not None or self._gid is not None

    @property
    def parts(self) -> tuple[str, ...] | None:
        """The parts of a five-tuple that the sets ask for, besides its protocol; None if some ask for more than that."""
        if self.by_process or self._hook is not None or self._places or self._named:
            return None
        tables = {"src": self._src, "sport": self._sport, "dst": self._dst, "dport": self._dport}
        return tuple(part for part, table in tables.items() if table is not None)

    def bits(self, packet: Packet, five_tuple: FiveTuple) -> int:
        """The sets that this packet meets, the first in the lowest bit. five_tuple: the packet's, or its flow's."""
        bits = self._all
        if self._dst is not None:
            bits &= self._dst.look_up(five_tuple.dst)
        if self._src is not None:
            bits &= self._src.look_up(five_tuple.src)
        if self._dport is not None:
            bits &= self._dport.look_up(five_tuple.dport)
        if self._sport is not None:
            bits &= self._sport.look_up(five_tuple.sport)
        if self._protocol is not None:
            bits &= self._protocol[0].get(five_tuple.protocol, self._protocol[1])
        if self._hook is not None:
            bits &= self._hook[0].get(packet.hook, self._hook[1])
        for end, kind, (of, others) in self._places:
            place = NOWHERE if self._geography is None else self._geography.whereabouts(getattr(five_tuple, end))
            bits &= of.get(getattr(place, kind), others)
        if self._uid is not None:
            bits &= self._uid[0].get(packet.uid, self._uid[1])
        if self._gid is not None:
            bits &= self._gid[0].get(packet.gid, self._gid[1])
        if self._named and bits:
            now = packet.time
            inward = self._interface(self._interfaces.name(packet.indev, now))
            bits &= inward | self._interface(self._interfaces.name(packet.outdev, now))
        return bits

    def _interface(self, name: str) -> int:
        bits = self._by_name.get(name)
        if bits is None:
            # Containers appear and disappear under new names.
            if len(self._by_name) > 1024:
                self._by_name = {"": self._unnamed}
            bits = self._unnamed
            for patterns, bit in self._named:
                if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                    bits |= bit
            self._by_name[name] = bits
        return bits


def _hooks(rule: Conditions) -> tuple[int, ...] | None:
    if rule.hook is None and rule.direction is None:
        return None
    named = set(Hook) if rule.hook is None else {Hook[name.upper()] for name in rule.hook}
    return tuple(named if rule.direction is None else named & _DIRECTIONS[rule.direction])


def _networks(rules: Sequence[Conditions], key: str) -> NetworkMap | None:
    """The rules by network; None if no rule has the condition."""
    unasked = 0
    networks = []
    for place, rule in enumerate(rules):
        wanted = getattr(rule, key)
        if wanted is None:
            unasked |= 1 << place
        else:
            networks += [(network, 1 << place) for network in wanted]
    return NetworkMap(networks, unasked) if networks else None


def _values(rules: Sequence[Conditions], wanted_by: Callable[[Conditions], Any]) -> tuple[dict[Any, int], int] | None:
    """The rules by value, and those that do not ask for it; None if none does."""
    unasked = 0
    by_value: dict[Any, int] = {}
    for place, rule in enumerate(rules):
        wanted = wanted_by(rule)
        if wanted is None:
            unasked |= 1 << place
        for value in wanted or ():
            by_value[value] = by_value.get(value, 0) | 1 << place
    if not by_value:
        return None
    return {value: bits | unasked for value, bits in by_value.items()}, unasked


def _places(rules: Sequence[Conditions], end: str, kind: str) -> tuple[dict[Any, int], int] | None:
    """The rules by the country or the autonomous system of one end; None if no rule asks for it."""
    return _values(rules, lambda rule: getattr(rule, f"{end}_{kind}"))


class _PortMap:
    """The rules by port, as sets for the stretches between all ends of ranges."""

    def __init__(self, ranges: list[tuple[Ports, int]], unasked: int) -> None:
        self._unasked = unasked
        self._starts = sorted({0, *(ports.first for ports, _ in ranges), *(ports.last + 1 for ports, _ in ranges)})
        self._sets = [unasked] * len(self._starts)
        for ports, bit in ranges:
            for place in range(bisect_right(self._starts, ports.first) - 1, bisect_right(self._starts, ports.last)):
                self._sets[place] |= bit

    def look_up(self, port: int | None) -> int:
        if port is None:
            return self._unasked
        return self._sets[bisect_right(self._starts, port) - 1]


def _ports(rules: Sequence[Conditions], key: str) -> _PortMap | None:
    unasked = 0
    ranges: list[tuple[Ports, int]] = []
    for place, rule in enumerate(rules):
        wanted = getattr(rule, key)
        if wanted is None:
            unasked |= 1 << place
        else:
            ranges += [(each, 1 << place) for each in wanted]
    return _PortMap(ranges, unasked) if ranges else None
