"""The keys of `[rules.NAME]` that select packets. All of them must hold; of one key's values, any one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Final

from nfq_agent.config.lookups import HostLookups
from nfq_agent.config.model import Model
from nfq_agent.field import BeforeValidator, Field
from nfq_agent.packet import PROTOCOL_NAMES
from nfq_agent.values import NetworkField, PortsField, one_or_more

# The owner match knows a socket in these hooks only (iptables-extensions(8)), the cgroup match in one more (xt_cgroup.c).
OWNER_HOOKS: Final = ("output", "postrouting")
CGROUP_HOOKS: Final = ("input", "output", "postrouting")
_LAST_ID: Final = 0xFFFFFFFE
_NUMBERS: Final = {name: number for number, name in PROTOCOL_NAMES.items()}
_TCP, _UDP = 6, 17


@dataclass(frozen=True, slots=True, order=True)
class Identities:
    """A user's or group's id, or a range of them with both ends in it."""

    first: int
    last: int

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


def _identities(kind: str, find: Callable[[str], int]) -> Callable[[object], Identities]:
    def parse(value: object) -> Identities:
        if isinstance(value, Identities):
            return value
        first = last = -1
        if isinstance(value, int) and not isinstance(value, bool):
            first = last = value
        elif isinstance(value, str) and (match := re.fullmatch(r"(\d+)(?:[:-](\d+))?", value)):
            first, last = int(match[1]), int(match[2] or match[1])
        elif isinstance(value, str):
            try:
                first = last = find(value)
            except KeyError:
                raise ValueError(
                    f'no {kind} {value!r} on this host; allowed: an existing {kind}\'s name, an id, or a range as "1000:1999"'
                ) from None
        if not 0 <= first <= last <= _LAST_ID:
            raise ValueError(f'{value!r} is not a valid {kind}; allowed: a name, an id, or a range as "1000:1999"')
        return Identities(first, last)

    return parse


def _interface(value: object) -> str:
    """A name, or the beginning of one with `*` behind it, or the `+` of iptables, which is kept as `*`."""
    if isinstance(value, str) and re.fullmatch(r"[^\s/!*+,]{1,15}|[^\s/!*+,]{1,14}[*+]", value):
        return value.replace("+", "*")
    raise ValueError(
        f'{value!r} is not a valid interface; allowed: up to 15 characters, as in "eth0", or the start of names, as in "veth*"'
    )


def _protocol(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 255:
        return value
    if isinstance(value, str) and value.isdecimal() and 1 <= int(value) <= 255:
        return int(value)
    if isinstance(value, str) and value in _NUMBERS:
        return _NUMBERS[value]
    raise ValueError(f"{value!r} is not a valid protocol; allowed: 1 to 255, {', '.join(_NUMBERS)}")


def _ipset(value: object) -> str:
    """`NAME`, or `NAME DIRECTIONS` with those of iptables, as in `"blocked src"`; a name alone looks at the destination."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_.:-]{1,31}( (src|dst)(,(src|dst)){0,5})?", value):
        return value if " " in value else f"{value} dst"
    raise ValueError(
        f'{value!r} is not a valid set; allowed: the name of an ipset, alone or with directions, as in "blocked src"'
    )


def _cgroup(value: object) -> str:
    """A path below /sys/fs/cgroup; a service's name alone stands for the one in system.slice."""
    if isinstance(value, str) and re.fullmatch(r"/?[A-Za-z0-9:@._\\-]+(/[A-Za-z0-9:@._\\-]+)*", value):
        path = value.strip("/")
        return f"system.slice/{path}" if path.endswith(".service") and "/" not in path else path
    raise ValueError(
        f'{value!r} is not a valid control group; allowed: a path as "system.slice/nginx.service", or "nginx.service"'
    )


_LIST: Final = BeforeValidator(one_or_more)
_SOME: Final = Field(min_length=1, strict=False)
NetworkList = Annotated[tuple[NetworkField, ...], _LIST, _SOME]
PortLists = Annotated[tuple[PortsField, ...], _LIST, Field(strict=False)]
InterfacePatterns = Annotated[tuple[Annotated[str, BeforeValidator(_interface)], ...], _LIST, _SOME]
ProtocolNumbers = Annotated[tuple[Annotated[int, BeforeValidator(_protocol)], ...], _LIST, _SOME]
Sets = Annotated[tuple[Annotated[str, BeforeValidator(_ipset)], ...], _LIST, _SOME]
Cgroups = Annotated[tuple[Annotated[str, BeforeValidator(_cgroup)], ...], _LIST, _SOME]
UserRanges = Annotated[tuple[Annotated[Identities, BeforeValidator(_identities("user", HostLookups().uid))], ...], _LIST, _SOME]
GroupRanges = Annotated[tuple[Annotated[Identities, BeforeValidator(_identities("group", HostLookups().gid))], ...], _LIST, _SOME]


class Selection(Model):
    """What a rule takes, besides the table and the hooks. The base of RuleConfig."""

    tcp_ports: PortLists = ()
    udp_ports: PortLists = ()
    not_tcp_ports: PortLists = ()
    not_udp_ports: PortLists = ()
    tcp_syn: bool = False
    all: bool = False
    protocol: ProtocolNumbers | None = None
    src: NetworkList | None = None
    dst: NetworkList | None = None
    not_src: NetworkList | None = None
    not_dst: NetworkList | None = None
    set: Sets | None = None
    not_set: Sets | None = None
    interface: InterfacePatterns | None = None
    not_interface: InterfacePatterns | None = None
    uid: UserRanges | None = None
    gid: GroupRanges | None = None
    not_uid: UserRanges | None = None
    not_gid: GroupRanges | None = None
    cgroup: Cgroups | None = None
    not_cgroup: Cgroups | None = None


def selection_faults(selection: Selection) -> Iterator[str]:
    """Keys that do not go together."""
    ports = selection.tcp_ports or selection.udp_ports
    if not (ports or selection.tcp_syn or selection.all or selection.protocol):
        yield "the rule takes no traffic; allowed: tcp_ports, udp_ports, tcp_syn = true, protocol or all = true"
    if selection.all and (ports or selection.tcp_syn or selection.protocol):
        yield "all = true takes everything; allowed: without tcp_ports, udp_ports, tcp_syn and protocol"
    if selection.protocol and (ports or selection.tcp_syn):
        yield "protocol takes all of a protocol; allowed: without tcp_ports, udp_ports and tcp_syn"
    if selection.not_tcp_ports and not _takes(selection, _TCP, bool(selection.tcp_ports or selection.tcp_syn)):
        yield "not_tcp_ports takes ports from TCP, and the rule takes no TCP; allowed: with all, tcp_ports, tcp_syn or protocol"
    if selection.not_udp_ports and not _takes(selection, _UDP, bool(selection.udp_ports)):
        yield "not_udp_ports takes ports from UDP, and the rule takes no UDP; allowed: with all, udp_ports or protocol"
    if selection.interface and selection.not_interface:
        yield "interface and not_interface both choose interfaces; allowed: one of them"
    for key in ("src", "dst"):
        for each in getattr(selection, key) or ():
            if any(each == other for other in getattr(selection, f"not_{key}") or ()):
                yield f"{each} is in {key} and in not_{key}; allowed: one of them"


def _takes(selection: Selection, protocol: int, by_ports: bool) -> bool:
    return selection.all or by_ports or protocol in (selection.protocol or ())
