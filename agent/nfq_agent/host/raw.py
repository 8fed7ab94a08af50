"""Raw sockets: send whole packets, from the IP header on. Opening them takes CAP_NET_RAW, sending no capability.

So the supervisor opens them, and the worker without that capability inherits them (raw(7), packet(7), ipv6(7)).
"""

from __future__ import annotations

import contextlib
import socket
from struct import Struct
from typing import Final, Self

from nfq_agent.host.jail.fixed import FixedMessages

# linux/in6.h; the sender provides the header, as with IPPROTO_RAW for IPv4 (raw(7)).
_IPV6_HDRINCL: Final = 36
# struct nlmsghdr, struct rtmsg, struct rtattr (linux/netlink.h, linux/rtnetlink.h)
_MESSAGE: Final = Struct("=IHHII")
_ROUTE: Final = Struct("=BBBBBBBBI")
_ATTRIBUTE: Final = Struct("=HH")
_RTM_NEWROUTE: Final = 24
_RTM_GETROUTE: Final = 26
_NLM_F_REQUEST: Final = 1
_RTA_DST: Final = 1
_RTN_BROADCAST: Final = 3


class RawSockets:
    """One for each family that the kernel has."""

    def __init__(self) -> None:
        """Raises PermissionError without CAP_NET_RAW."""
        self._v4 = socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_RAW)
        self._routes = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        length = _MESSAGE.size + _ROUTE.size + _ATTRIBUTE.size + 4
        self._question = FixedMessages([[_MESSAGE.pack(length, _RTM_GETROUTE, _NLM_F_REQUEST, 0, 0), length - _MESSAGE.size]])
        self._v6: socket.socket | None = None
        # A kernel without IPv6 has no packets of it either.
        with contextlib.suppress(OSError):
            self._v6 = socket.socket(socket.AF_INET6, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_RAW)
            self._v6.setsockopt(socket.IPPROTO_IPV6, _IPV6_HDRINCL, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """The IPv4 socket's descriptor."""
        return self._v4.fileno()

    def filenos(self) -> list[int]:
        """All descriptors."""
        return [each.fileno() for each in (self._v4, self._v6, self._routes) if each is not None]

    @property
    def fixed(self) -> tuple[tuple[int, int, int], int]:
        """Where the header of the question for a route is (FixedMessages.headers), and the descriptor of its socket."""
        return self._question.headers, self._routes.fileno()

    def send(self, packet: bytes, interface: int = 0) -> None:
        """Send a packet to its own destination; never blocks. One to or from a broadcast address is not sent.

        interface: index for a destination of link-local scope, which is reachable in no other way. Raises OSError: no route, a
        firewall's DROP in OUTPUT (EPERM), a full queue (ENOBUFS, EAGAIN).
        """
        if packet[0] >> 4 == 4:
            if self._is_broadcast(packet[12:16]) or self._is_broadcast(packet[16:20]):
                return
            self._v4.sendto(packet, (socket.inet_ntop(socket.AF_INET, packet[16:20]), 0))
        elif self._v6 is not None:
            destination = packet[24:40]
            # fe80::/10 (RFC 4291 2.5.6)
            local = destination[0] == 0xFE and destination[1] & 0xC0 == 0x80
            address = socket.inet_ntop(socket.AF_INET6, destination)
            self._v6.sendto(packet, (address, 0, 0, interface if local else 0))

    def _is_broadcast(self, address: bytes) -> bool:
        """The answer of the routing table, which has the networks of all interfaces (rtnetlink(7), RTM_GETROUTE)."""
        head = _ROUTE.pack(socket.AF_INET, 32, 0, 0, 0, 0, 0, 0, 0)
        destination = _ATTRIBUTE.pack(8, _RTA_DST) + address
        self._question.send(self._routes.fileno(), 0, head + destination)
        answer = self._routes.recv(4096)
        kind: int = _MESSAGE.unpack_from(answer)[1]
        found: int = _ROUTE.unpack_from(answer, _MESSAGE.size)[7]
        return kind == _RTM_NEWROUTE and found == _RTN_BROADCAST

    def close(self) -> None:
        """Close them."""
        self._routes.close()
        self._v4.close()
        if self._v6 is not None:
            self._v6.close()
