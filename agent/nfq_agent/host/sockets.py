"""The proxy's calls to the kernel: original destinations, marks, and foreign source addresses."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from typing import Any, Final

# linux/netfilter_ipv4.h and linux/netfilter_ipv6/ip6_tables.h; both have the same number.
SO_ORIGINAL_DST: Final = 80
# linux/in.h and linux/in6.h
IP_TRANSPARENT: Final = 19
IPV6_TRANSPARENT: Final = 75
IP_BIND_ADDRESS_NO_PORT: Final = 24
# asm-generic/socket.h
SO_MARK: Final = 36

# Probes before a silent peer counts as gone.
_PROBES: Final = 6
# linux/tcp.h, struct tcp_info: 8 bytes of flags, then 32-bit fields.
_TCP_INFO_BYTES: Final = 104
_TCPI_UNACKED: Final = 24

_V4: Final = struct.Struct("!2xH4s8x")
# Family, port, flow label, address, scope: the scope alone is in the host's byte order (ipv6(7)).
_V6: Final = struct.Struct("!2xHI16s")
_MAPPED: Final = "::ffff:"
_LINK_LOCAL: Final = b"\xfe\x80"
# Nothing was redirected: no entry in the connection table, no connection tracking, or no such option at all.
_UNKNOWN: Final = frozenset((errno.ENOENT, errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.EINVAL))

# (host, port) for IPv4, (host, port, flow label, scope) for IPv6.
Address = tuple[Any, ...]


def unmapped(address: Address) -> Address:
    """An IPv4 address for one that is mapped into IPv6 (`::ffff:192.0.2.1`, RFC 4291 2.5.5.2); any other as it is."""
    host = address[0]
    return (host[len(_MAPPED) :], address[1]) if host.startswith(_MAPPED) and "." in host else address


def original_destination(connection: socket.socket, client: Address) -> Address | None:
    """Where a redirected connection was going before the NAT; None where the kernel does not know.

    A connection that was not redirected gives its own listener. client: the peer's address; a v4-mapped one needs the IPv4
    option on its IPv6 socket. Raises OSError. Source: getorigdst() in net/netfilter/nf_conntrack_proto.c.
    """
    try:
        # An IPv4 address has two parts; asking the socket for its family costs a system call.
        if len(client) == 2 or client[0].startswith(_MAPPED):
            port, packed = _V4.unpack(connection.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, _V4.size))
            return socket.inet_ntop(socket.AF_INET, packed), port
        data = connection.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, 28)
    except OSError as error:
        if error.errno in _UNKNOWN:
            return None
        raise
    port, _, packed = _V6.unpack_from(data)
    # The kernel gives the scope only of a socket that is bound to an interface; the peer's is the same link.
    scope = struct.unpack_from("=I", data, 24)[0] or (client[3] if packed[:2] == _LINK_LOCAL else 0)
    return socket.inet_ntop(socket.AF_INET6, packed), port, 0, scope


def set_transparent(sock: socket.socket) -> None:
    """Let a socket take, or bind to, addresses that are not this host's (ip(7), IP_TRANSPARENT). Needs CAP_NET_ADMIN."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
    else:
        sock.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)


def bind_as(sock: socket.socket, client: Address) -> None:
    """Make an unconnected socket speak with a client's address and port. Needs CAP_NET_ADMIN. Raises OSError."""
    set_transparent(sock)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(client)


def set_mark(sock: socket.socket, mark: int) -> None:
    """Mark the packets that a socket sends (socket(7), SO_MARK). Needs CAP_NET_ADMIN."""
    sock.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)


def no_delay(sock: socket.socket) -> None:
    """Send small segments at once (tcp(7), TCP_NODELAY)."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def keep_alive(sock: socket.socket, seconds: float) -> None:
    """Probe a silent peer after `seconds`, and reset the connection if it does not answer for as long again (tcp(7)).

    A peer that no longer knows the connection (a lost entry of connection tracking, a restart) resets it at the first probe.
    """
    whole = max(1, round(seconds))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, whole)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, whole // _PROBES))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)


def backlog_of(listener: socket.socket) -> int:
    """Connections that wait to be accepted (tcpi_unacked of a listener, tcp_get_info() in net/ipv4/tcp.c)."""
    info = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    return int(struct.unpack_from("=I", info, _TCPI_UNACKED)[0])


def reset_on_close(sock: socket.socket) -> None:
    """Make close(2) send RST instead of FIN (socket(7), SO_LINGER of zero)."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)


def reset(sock: socket.socket) -> None:
    """Close a TCP socket with RST."""
    with contextlib.suppress(OSError):
        reset_on_close(sock)
    sock.close()


_ABORT: Final = struct.pack("ii", 1, 0)
