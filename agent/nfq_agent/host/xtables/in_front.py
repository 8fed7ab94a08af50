"""Foreign rules of legacy tables that are asked before ours. They are read by their bytes, and never changed.

Formats: struct ipt_ip and ip6t_ip6 (linux/netfilter_ipv4/ip_tables.h and its like for IPv6), struct xt_tcp, xt_udp and
xt_multiport_v1 (linux/netfilter/xt_tcpudp.h, xt_multiport.h).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from struct import Struct
from typing import Final, NamedTuple

from nfq_agent.host.families import ADDRESS_FAMILIES
from nfq_agent.host.xtables.image import Entry, Image
from nfq_agent.rules.foreign import InFront, PortRange, Reach, reach_of
from nfq_agent.rules.model import Family, Installed, TableState


class EntryLayout(NamedTuple):
    """Where the fields of an entry are, in bytes from its begin."""

    interfaces: int
    protocol: int
    flags: int
    target: int
    counters: int
    matches: int


LAYOUTS: Final[Mapping[Family, EntryLayout]] = {
    "inet": EntryLayout(16, 80, 83, 88, 96, 112),
    "inet6": EntryLayout(64, 128, 132, 140, 152, 168),
}
# XT_INV_* and IPT_INV_VIA_*, in the field invflags.
_NOT_IN, _NOT_OUT, _NOT_PROTOCOL = 0x01, 0x02, 0x40
_HEADER: Final = Struct("=H29sB")
_SHORT: Final = Struct("=H")
_COUNTERS: Final = Struct("=QQ")
_PORTS: Final = Struct("=4H")
# Where invflags of struct xt_tcp and of struct xt_udp are.
_PORT_FLAGS: Final = {"tcp": 11, "udp": 8}
_MULTIPORT: Final = Struct("=BB15H15sB")
_ALL_PORTS: Final = (0, 65535)
# What ends a packet's way through a table before our jump: not by refusing it, which is a firewall's business.
_TAKING: Final = frozenset(("ACCEPT", "QUEUE", "NFQUEUE", "REDIRECT", "DNAT", "NETMAP", "TPROXY"))
# A rule of ours is put at the head of its chain: rules before it were added later, and are few.
_MOST: Final = 1000
_DEEPEST: Final = 8


def in_front(family: Family, table: str, state: TableState) -> list[InFront]:
    """What of a table may take traffic that our rules select. state: what the table holds of ours. Raises OSError."""
    if not any(jump.number > 1 for jump in state.jumps):
        return []
    image = Image(ADDRESS_FAMILIES[family], table)
    found = []
    for jump in state.jumps:
        wanted = [reach_of(each.rule) for each in state.chains.get(jump.rule.target.name, ()) if _takes(each)]
        for entry in _before(image, jump):
            if taken := [each for each in _taking(image, family, entry, _DEEPEST) if any(map(each[1].may_meet, wanted))]:
                targets = "/".join(dict.fromkeys(target for target, _, _ in taken))
                packets = sum(count for _, _, count in taken)
                found.append(InFront(family, table, jump.rule.chain, entry.number, targets, packets))
    return found


def _takes(each: Installed) -> bool:
    return each.rule.target.name in ("NFQUEUE", "REDIRECT", "TPROXY")


def _before(image: Image, jump: Installed) -> Iterator[Entry]:
    chain = os.fsencode(jump.rule.chain)
    for entry in image.entries(frozenset((chain,)), b"\0no tag\0"):
        if entry.number >= min(jump.number, _MOST):
            return
        if entry.chain == chain:
            yield entry


def _taking(image: Image, family: Family, entry: Entry, depth: int) -> Iterator[tuple[str, Reach, int]]:
    """(target, selection, packets) of the rule, or of the rules that it leads to, where they take what they select."""
    selection = _reach(family, entry.data)
    name = target_of(family, entry)
    if name in _TAKING:
        yield name, selection, _COUNTERS.unpack_from(entry.data, LAYOUTS[family].counters)[0]
    elif entry.jump and depth and entry.jump not in (b"DROP", b"RETURN"):
        for inner in image.entries(frozenset((entry.jump,)), b"\0no tag\0"):
            for target, narrower, packets in _taking(image, family, inner, depth - 1):
                if selection.may_meet(narrower):
                    # Both select: what the outer rule leaves out never gets there.
                    yield target, selection if narrower == Reach() else narrower, packets


def target_of(family: Family, entry: Entry) -> str:
    """The verdict, the chain or the extension that a rule leads to; empty for none."""
    if entry.jump is not None:
        return os.fsdecode(entry.jump)
    place = _SHORT.unpack_from(entry.data, LAYOUTS[family].target)[0]
    return os.fsdecode(_HEADER.unpack_from(entry.data, place)[1].split(b"\0")[0])


def _reach(family: Family, data: bytes) -> Reach:
    layout = LAYOUTS[family]
    flags, protocol = data[layout.flags], _SHORT.unpack_from(data, layout.protocol)[0]
    names = [data[layout.interfaces + 16 * place :][:16].split(b"\0")[0] for place in range(2)]
    return Reach(
        None if flags & _NOT_PROTOCOL or not protocol else protocol,
        "" if flags & _NOT_IN else os.fsdecode(names[0]),
        "" if flags & _NOT_OUT else os.fsdecode(names[1]),
        *_ports(layout, data),
    )


def _ports(layout: EntryLayout, data: bytes) -> tuple[tuple[PortRange, ...] | None, ...]:
    """The source ports, the destination ports, and those of which either may be one."""
    found: list[tuple[PortRange, ...] | None] = [None, None, None]
    for name, revision, body in matches_of(layout, data):
        if name in _PORT_FLAGS and not body[_PORT_FLAGS[name]] & 3:
            first, last, first_destination, last_destination = _PORTS.unpack_from(body)
            for kind, interval in enumerate(((first, last), (first_destination, last_destination))):
                if interval != _ALL_PORTS:
                    found[kind] = (interval,)
        elif name == "multiport" and revision == 1:
            kind, *listed = _MULTIPORT.unpack_from(body)
            if not listed[-1]:
                found[kind] = _multiport(listed[0], listed[1:16], listed[16])
    return tuple(found)


def matches_of(layout: EntryLayout, data: bytes) -> Iterator[tuple[str, int, bytes]]:
    """(name, revision, contents) of each match of an entry."""
    place, end = layout.matches, _SHORT.unpack_from(data, layout.target)[0]
    while place + _HEADER.size <= end:
        size, raw, revision = _HEADER.unpack_from(data, place)
        yield os.fsdecode(raw.split(b"\0")[0]), revision, data[place + _HEADER.size : place + size]
        if size < _HEADER.size:
            break
        place += size


def _multiport(count: int, ports: list[int], is_first: bytes) -> tuple[PortRange, ...]:
    """The intervals of a list in which some ports are the first of a pair."""
    intervals = []
    place = 0
    while place < count:
        last = place + (1 if is_first[place] else 0)
        intervals.append((ports[place], ports[last]))
        place = last + 1
    return tuple(intervals)
