"""The addresses of the other end of a veth pair, as the kernel lists them from that end's network namespace. It only reads."""

from __future__ import annotations

import socket
import struct
from typing import Final

from nfq_agent.host.attributes import attribute
from nfq_agent.host.links import Link
from nfq_agent.host.rtnetlink import Rtnetlink, by_type

# linux/rtnetlink.h, linux/if_addr.h
_RTM_GETADDR: Final = 22
_IFA_ADDRESS: Final = 1
_IFA_LOCAL: Final = 2
_IFA_TARGET_NETNSID: Final = 10
# struct ifaddrmsg: family, prefix, flags, scope, index.
_IFADDR: Final = struct.Struct("=BBBBI")
_NUMBER: Final = struct.Struct("=i")


def peer_addresses(link: Link) -> frozenset[bytes]:
    """The addresses (packed, 4 or 16 bytes) of the interface that `link` leads to; none where it leads to no other namespace.

    Raises OSError: EPERM without CAP_NET_ADMIN in that namespace, EINVAL where the kernel is older than 4.20, ENODEV if the other
    end is gone. Source: inet_dump_ifaddr() in net/ipv4/devinet.c.
    """
    if link.netns is None:
        return frozenset()
    number = _NUMBER.pack(link.netns)
    found: set[bytes] = set()
    with Rtnetlink(strict=True) as rtnetlink:
        for family in (socket.AF_INET, socket.AF_INET6):
            request = _IFADDR.pack(family, 0, 0, 0, link.peer) + attribute(_IFA_TARGET_NETNSID, number)
            for body in rtnetlink.dump(_RTM_GETADDR, request):
                said = by_type(body[_IFADDR.size :])
                # A kernel that does not read the number would list the addresses of this namespace.
                if said.get(_IFA_TARGET_NETNSID) != number or _IFADDR.unpack_from(body)[4] != link.peer:
                    continue
                # On a point-to-point interface the other one is that of its far end.
                address = said.get(_IFA_LOCAL, said.get(_IFA_ADDRESS))
                if address is not None:
                    found.add(address)
    return frozenset(found)
