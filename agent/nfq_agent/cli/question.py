"""The packet that `explain` is asked about, and the place where it is seen. Values only."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from nfq_agent.owner import Owner
from nfq_agent.packet import ICMP, ICMPV6, PROTOCOL_NAMES, WITH_PORTS, Hook, Packet
from nfq_agent.testing import icmp, ip_packet, tcp, udp
from nfq_agent.values import Endpoint

_INWARD: Final = ("prerouting", "input")
_OUTWARD: Final = ("output", "postrouting")
_NUMBERS: Final = {name: number for number, name in PROTOCOL_NAMES.items()}
# What a packet of IPv6 has in front of its protocol (packet.decode).
_EXTENSIONS: Final = (0, 43, 44, 51, 60, 135, 139, 140)
_UNASSIGNED: Final = 253
# The indices of the packet's interfaces: of the one that it enters by, and of the one that it leaves by.
_ENTERS: Final = 1
_LEAVES: Final = 2
# What says a name over TCP and over UDP: by the usual port the protocol, and the fact that holds the name.
_HTTP: Final = ("http", "http_host")
_DNS: Final = ("dns", "dns_name")
_NAMES: Final[Mapping[str, Mapping[int, tuple[str, str]]]] = {
    "tcp": {80: _HTTP, 53: _DNS, 443: ("tls", "tls_sni")},
    "udp": {53: _DNS, 443: ("quic", "tls_sni")},
}
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_End = tuple[_Address, int]


@dataclass(frozen=True)
class Question:
    """The packet of the question. source, destination: ADDRESS:PORT; without ports for a protocol that has none.

    protocol: the name or the number of one of the IP header. name: in its first bytes. interface: by which it enters, or, where
    it is sent by this host, leaves. to_interface: by which it leaves where it is forwarded. sets: the ipsets that have it.
    """

    protocol: str
    source: str
    destination: str
    name: str = ""
    hook: str = "output"
    interface: str = ""
    uid: int | None = None
    unit: str = ""
    container: str = ""
    exe: str = ""
    gid: int | None = None
    cgroup: str = ""
    sets: tuple[str, ...] = ()
    mark: int = 0
    to_interface: str = ""

    @property
    def owner(self) -> dict[str, Any]:
        """The owner of the socket, as far as it is given; without what no agent knows of a packet in this hook."""
        from_path = {} if not self.cgroup else Owner(0, 0, f"/{self.cgroup.strip('/')}").facts
        from_path.pop("uid", None)
        given = {"unit": self.unit, "container": self.container, "exe": self.exe}
        known = {**from_path, **{key: value for key, value in given.items() if value}}
        # What is forwarded has no socket here; a container is known by its interface.
        return {key: value for key, value in known.items() if self.hook != "forward" or key == "container"}

    @property
    def not_known(self) -> list[str]:
        """What is given, and the kernel does not tell of a packet in this hook."""
        owned = {"unit": self.unit, "cgroup": self.cgroup, "exe": self.exe} if self.hook == "forward" else {}
        process = {} if self.sent else {"uid": self.uid, "gid": self.gid}
        return [key for key, value in {**owned, **process}.items() if value not in (None, "")]

    @property
    def number(self) -> int:
        """The protocol of the IP header."""
        number = protocol_number(self.protocol)
        return ICMPV6 if number == ICMP and self.version == 6 else number

    @property
    def version(self) -> int:
        """4 or 6."""
        return self.destination_address.version

    def check(self) -> None:
        """Raises ValueError if the protocol is unknown, an end is not an address and a port, or the ends are of two families."""
        protocol_number(self.protocol)
        if self.source_address.version != self.version:
            raise ValueError(
                f"{self.source} and {self.destination} are of different families; allowed: two of IPv4, or two of IPv6"
            )
        if self.number == ICMPV6 and self.version == 4:
            raise ValueError("icmpv6 is between addresses of IPv6; allowed: icmp")
        if self.version == 6 and self.number in _EXTENSIONS:
            raise ValueError(
                f"{self.protocol} is an extension header in IPv6, and no rule looks at it; allowed: the protocol behind it"
            )

    @cached_property
    def _ends(self) -> tuple[_End, _End]:
        # Each rule looks at them, and `replay` asks about each packet of other ends.
        return self._end(self.source), self._end(self.destination)

    @property
    def with_ports(self) -> bool:
        """Whether packets of the protocol have ports."""
        return has_ports(self.protocol)

    def _end(self, text: str) -> _End:
        host, port = text, 0
        try:
            if self.with_ports:
                end = Endpoint.parse(text, lowest=0)
                host, port = end.host, end.port
            return ipaddress.ip_address(host), port
        except ValueError:
            what = "an address with a port" if self.with_ports else "an address"
            examples = ("192.0.2.1:443", "[2001:db8::1]:443") if self.with_ports else ("192.0.2.1", "2001:db8::1")
            raise ValueError(f"{text!r} is not {what}; allowed: one as {examples[0]} or {examples[1]}") from None

    @property
    def source_address(self) -> _Address:
        """The source."""
        return self._ends[0][0]

    @property
    def destination_address(self) -> _Address:
        """The destination."""
        return self._ends[1][0]

    @property
    def sport(self) -> int:
        """Source port."""
        return self._ends[0][1]

    @property
    def dport(self) -> int:
        """Destination port."""
        return self._ends[1][1]

    @property
    def sent(self) -> bool:
        """Whether the hook is one of what this host sends."""
        return self.hook in _OUTWARD

    @property
    def enters(self) -> str:
        """The interface by which it enters; empty where none is given, and for what this host sends."""
        return "" if self.sent else self.interface

    @property
    def leaves(self) -> str:
        """The interface by which it leaves; empty where none is given, and for what this host receives."""
        if self.hook in _INWARD:
            return ""
        return self.to_interface or (self.interface if self.sent else "")

    def interface_name(self, index: int) -> str:
        """The name of one of the packet's interfaces."""
        return {_ENTERS: self.enters, _LEAVES: self.leaves}.get(index, "")

    def packet(self, data: bytes = b"") -> Packet:
        """The first packet of the flow, or one with data."""
        sent = self.sent
        shown: dict[str, Any] = {
            "hook": Hook[self.hook.upper()], "uid": self.uid if sent else None, "gid": self.gid if sent else None, "time": 1.0,
            "mark": self.mark, "indev": _ENTERS * bool(self.enters), "outdev": _LEAVES * bool(self.leaves),
        }  # fmt: skip
        if self.protocol == "tcp":
            return tcp(self.source, self.destination, data, flags="PA" if data else "S", **shown)
        if self.protocol == "udp":
            return udp(self.source, self.destination, data, **shown)
        if self.protocol in ("icmp", "icmpv6"):
            return icmp(self.source, self.destination, **shown)
        ports = b"" if not self.with_ports else self.sport.to_bytes(2) + self.dport.to_bytes(2)
        ends = (self.source_address.packed, self.destination_address.packed)
        # With a number that has no checksum of its own, which is then replaced: nothing here looks at checksums.
        whole = ip_packet(*ends, _UNASSIGNED, ports + bytes(16))
        place = 9 if self.version == 4 else 6
        return Packet(whole[:place] + bytes([self.number]) + whole[place + 1 :], **shown)

    def facts(self, asked: Iterable[str]) -> dict[str, Any]:
        """What `dpi` would find; nothing where the protocol says no names.

        asked: the facts that the rules ask for; they decide on a port without a known protocol.
        """
        by_port = _NAMES.get(self.protocol)
        if by_port is None:
            return {}
        said = by_port.get(self.dport) or next((each for each in by_port.values() if each[1] in asked), by_port[443])
        value: Any = (self.name,) if said is _DNS else self.name
        return {"dpi": "decided", "protocol": said[0], said[1]: value}


def protocol_number(text: str) -> int:
    """The number of a protocol of the IP header by its name or number. Raises ValueError."""
    number = _NUMBERS.get(text)
    if number is None and text.isdecimal() and int(text) <= 255:
        number = int(text)
    if number is None:
        raise ValueError(f"{text!r} is not a known protocol; allowed: {', '.join(_NUMBERS)}, or a number up to 255")
    return number


def has_ports(text: str) -> bool:
    """Whether packets of the protocol have ports. Raises ValueError."""
    return protocol_number(text) in WITH_PORTS


def plain_name(text: str) -> str:
    """The protocol by its name, `tcp` for 6, or by its number where it has none here. Raises ValueError."""
    number = protocol_number(text)
    return PROTOCOL_NAMES.get(number) or str(number)
