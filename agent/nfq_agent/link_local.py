"""ICMPv6 without which an IPv6 link does not work: neighbour discovery and multicast listener discovery."""

from __future__ import annotations

from typing import Final

from nfq_agent.packet import ICMPV6, Packet, PacketError

# Router and neighbour solicitation and advertisement, redirect (RFC 4861 4). Routers do not forward them: their hop limit is 255
# and a receiver discards any other value (RFC 4861 6.1, 7.1).
_DISCOVERY: Final = range(133, 138)
# Listener query, report, done, and the report of version 2 (RFC 2710 3, RFC 3810 5): from a link-local source, hop limit 1.
_LISTENER: Final = frozenset((130, 131, 132, 143))
_HOP_LIMIT: Final = 7


def needed_by_link(packet: Packet) -> bool:
    """True for a packet of neighbour or listener discovery that cannot have come from another link.

    ARP does the same for IPv4 and does not pass netfilter's IP hooks, so a policy that drops by default leaves IPv4 links alone.
    """
    if packet.payload[:1] < b"\x60":
        # IPv4, as most packets are, without a look at its headers.
        return False
    try:
        headers = packet.headers
    except PacketError:
        return False
    if headers.five_tuple.protocol != ICMPV6 or headers.fragment or headers.transport is None:
        return False
    kind = packet.payload[headers.transport : headers.transport + 1]
    hop_limit = packet.payload[_HOP_LIMIT]
    return bool(kind) and ((kind[0] in _DISCOVERY and hop_limit == 255) or (kind[0] in _LISTENER and hop_limit == 1))
