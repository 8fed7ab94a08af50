"""Evasions below the messages: several datagrams in one send, and headers that push the ports away."""

from __future__ import annotations

import contextlib
import socket

from evasion_attempt import Attempt
from evasion_config import DNS, NGINX
from evasion_line import Line
from evasion_servers import QUIC
from evasion_tls import first_flight
from openings import dns_query

# linux/udp.h
_UDP_SEGMENT = 103
_NOP, _EXPERIMENT = 1, 0x1E


def _request(name: str) -> bytes:
    return f"GET /packets HTTP/1.1\r\nHost: {name}\r\n\r\n".encode()


def _joined(client: socket.socket, datagrams: list[bytes]) -> None:
    """Send datagrams of one length at once."""
    client.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, len(datagrams[0]))
    for _ in range(5):
        client.send(b"".join(datagrams))
        with contextlib.suppress(TimeoutError):
            client.recv(2000)
            return


def _dns_joined(attempt: Attempt, name: str) -> None:
    with attempt.udp(DNS) as client:
        _joined(client, [dns_query(attempt.allowed), dns_query(name), dns_query(attempt.allowed)])


def _quic_joined(attempt: Attempt, name: str) -> None:
    with attempt.udp(QUIC) as client:
        _joined(client, [first_flight(each, (attempt.address, QUIC))[0] for each in (attempt.allowed, name)])


def _long_headers(attempt: Attempt, name: str) -> None:
    """IPv6 destination options of 248 bytes, or all the options that IPv4 has room for."""
    with attempt.tcp(NGINX) as connection:
        if attempt.family == 4:
            connection.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, bytes((_NOP,)) * 40)
        else:
            # The next header is the kernel's; then an option that a host may pass over (RFC 8200 4.2, RFC 4727).
            options = bytes((0, 30, _EXPERIMENT, 244)) + bytes(244)
            connection.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_DSTOPTS, options)
        connection.sendall(_request(name))
        attempt.drain(connection)


LINES = (
    Line(
        "dns-joined", "DNS over UDP: three queries in one send (`UDP_SEGMENT`), the one between is denied", _dns_joined, twin=True
    ),
    Line("quic-joined", "QUIC: two connections in one send (`UDP_SEGMENT`), the second is denied", _quic_joined, twin=True),
    Line(
        "long-headers",
        "HTTP: IPv6 destination options of 248 bytes, or 40 bytes of IPv4 options, before the TCP header",
        _long_headers,
        raw=True,
        twin=True,
    ),
)
