"""Decoys: segments that we see and that the server never takes, with an allowed name where the client then sends the other."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from evasion_attempt import Attempt
from evasion_bed import FAR
from evasion_config import NGINX
from evasion_line import Line
from evasion_servers import QUIC, TLS
from evasion_tls import first_flight, send_flight
from openings import client_hello, made_hello, numbers, server_name

from nfq_agent.testing import ip_packet

_FIN, _SYN, _RST, _PSH, _ACK = 1, 2, 4, 8, 16
# linux/tcp.h
_REPAIR, _REPAIR_QUEUE, _QUEUE_SEQ, _TIMESTAMP = 19, 20, 21, 24
_RECEIVE, _SEND = 1, 2
# linux/in6.h: the payload of a raw IPv6 socket begins with the IP header.
_IPV6_HDRINCL = 36

# Bytes of a segment, so that its packet fits into an Ethernet frame.
_SEGMENT = 1200

Payload = Callable[[str], bytes]


class Wire:
    """A connection of the kernel's, and a raw socket beside it that sends segments of the same connection."""

    def __init__(self, attempt: Attempt, port: int) -> None:
        self.connection = attempt.tcp(port)
        self._family = attempt.family
        # The client's and the server's next sequence numbers, which a socket under repair shows (CRIU's interface).
        self.connection.setsockopt(socket.IPPROTO_TCP, _REPAIR, 1)
        self.next = self._queue(_SEND)
        self.peer = self._queue(_RECEIVE)
        self.clock = self.connection.getsockopt(socket.IPPROTO_TCP, _TIMESTAMP) & 0xFFFFFFFF
        self.connection.setsockopt(socket.IPPROTO_TCP, _REPAIR, -1)
        kind = socket.AF_INET if attempt.family == 4 else socket.AF_INET6
        self._raw = socket.socket(kind, socket.SOCK_RAW, socket.IPPROTO_RAW)
        if attempt.family == 6:
            self._raw.setsockopt(socket.IPPROTO_IPV6, _IPV6_HDRINCL, 1)

    def _queue(self, which: int) -> int:
        self.connection.setsockopt(socket.IPPROTO_TCP, _REPAIR_QUEUE, which)
        return self.connection.getsockopt(socket.IPPROTO_TCP, _QUEUE_SEQ) & 0xFFFFFFFF

    def send(self, data: bytes, *, seq: int | None = None, **forged: Any) -> None:
        """Send bytes in as many segments as they take, each forged alike. seq: the number of the first byte, the client's next if
        None. forged: as `segment` takes it."""
        seq = self.next if seq is None else seq
        for at in range(0, max(1, len(data)), _SEGMENT):
            self.segment(data[at : at + _SEGMENT], seq=seq + at, **forged)
        # So that it comes first.
        time.sleep(0.05)

    def segment(  # one for each field that a decoy forges
        self,
        data: bytes,
        *,
        seq: int,
        ack: int = 0,
        flags: int = _PSH | _ACK,
        options: bytes = b"",
        age: int | None = 0,
        ttl: int = 64,
        checksum: int = 0,
    ) -> None:
        """Send a segment. seq: its number. ack: added to the right one. age: of the timestamp, in its
        ticks, None for no timestamp. checksum: bits of it that are turned."""
        if age is not None:
            options += struct.pack("!BBBBII", 1, 1, 8, 10, self.clock - age & 0xFFFFFFFF, 0)
        options += b"\1" * (-len(options) % 4)
        source, target = self.connection.getsockname(), self.connection.getpeername()
        header = struct.pack(
            "!HHIIBBHHH", source[1], target[1], seq & 0xFFFFFFFF, self.peer + ack & 0xFFFFFFFF,
            5 + len(options) // 4 << 4, flags, 502, 0, 0,
        )  # fmt: skip
        ends = [ipaddress.ip_address(end[0]).packed for end in (source, target)]
        packet = bytearray(ip_packet(ends[0], ends[1], socket.IPPROTO_TCP, header + options + data))
        start = 20 if self._family == 4 else 40
        packet[8 if self._family == 4 else 7] = ttl
        packet[start + 16] ^= checksum >> 8
        packet[start + 17] ^= checksum & 0xFF
        self._raw.sendto(bytes(packet), (target[0], 0))

    def close(self) -> None:
        self._raw.close()
        self.connection.close()


def _http(name: str) -> bytes:
    return f"GET /decoy HTTP/1.1\r\nHost: {name}\r\n\r\n".encode()


def _large_hello(name: str) -> bytes:
    """As OpenSSL 3.5 has it: a key share (RFC 8446 4.2.8) of more than a segment before the name."""
    share = 0x33, struct.pack("!HHH", 1220, 0x11EC, 1216) + bytes(1216)
    return made_hello((0x1301, 0xC02F), [share, numbers(13, 0x0403, 0x0804), numbers(10, 24, 23), server_name(name.encode())])


def _decoy(port: int, payload: Payload, forged: dict[str, int | bytes | None], attempt: Attempt, name: str) -> None:
    """The decoy, then the client's own bytes in its place."""
    with contextlib.closing(Wire(attempt, port)) as wire:
        if "seq" in forged:
            forged = forged | {"seq": wire.next + int(forged["seq"] or 0)}
        wire.send(payload(attempt.allowed), **forged)  # type: ignore[arg-type]  # keywords of `send` by their names
        wire.connection.sendall(payload(name))
        attempt.drain(wire.connection)


def _half(port: int, payload: Payload, attempt: Attempt, name: str) -> None:
    """The decoy stands for the second half, and comes first."""
    with contextlib.closing(Wire(attempt, port)) as wire:
        data, allowed = payload(name), payload(attempt.allowed)
        cut = data.index(name.encode()) + 2
        wire.send(allowed[cut:], seq=wire.next + cut, ttl=FAR)
        wire.connection.sendall(data[:cut])
        time.sleep(0.05)
        wire.connection.sendall(data[cut:])
        attempt.drain(wire.connection)


def _junk(port: int, payload: Payload, attempt: Attempt, name: str) -> None:
    """The decoy is of no protocol."""
    with contextlib.closing(Wire(attempt, port)) as wire:
        wire.send(b"\xff\xfe\xfd" * 40, ttl=FAR)
        wire.connection.sendall(payload(name))
        attempt.drain(wire.connection)


def _other(near: bool, closing: int, port: int, payload: Payload, attempt: Attempt, name: str) -> None:
    """Another connection on the same ports that no server hears of. near: it ends where the real one begins."""
    with contextlib.closing(Wire(attempt, port)) as wire:
        allowed = payload(attempt.allowed)
        first = wire.next - len(allowed) if near else wire.next + 0x30000000
        if closing:
            wire.send(b"", flags=closing, ttl=FAR)
        wire.send(b"", seq=first - 1, flags=_SYN, ttl=FAR)
        wire.send(allowed, seq=first, ttl=FAR)
        wire.connection.sendall(payload(name))
        attempt.drain(wire.connection)


def _second_request(attempt: Attempt, name: str) -> None:
    """Behind an allowed request, in the place of the second one."""
    with contextlib.closing(Wire(attempt, NGINX)) as wire:
        wire.connection.sendall(_http(attempt.allowed))
        attempt.drain(wire.connection, 0.3)
        wire.send(_http(attempt.allowed), seq=wire.next + len(_http(attempt.allowed)), ttl=FAR)
        wire.connection.sendall(_http(name))
        attempt.drain(wire.connection)


def _quic(attempt: Attempt, name: str) -> None:
    """Two first flights with one connection id; the first ends on the way."""
    level, option = (socket.IPPROTO_IP, socket.IP_TTL) if attempt.family == 4 else (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS)
    with attempt.udp(QUIC) as client:
        client.setsockopt(level, option, FAR)
        number = attempt.name.encode().ljust(8, b"_")
        for datagram in first_flight(attempt.allowed, (attempt.address, QUIC), number=number):
            client.send(datagram)
        client.setsockopt(level, option, 64)
        send_flight(client, first_flight(name, (attempt.address, QUIC), number=number))


_FORGED: dict[str, tuple[str, dict[str, int | bytes | None]]] = {
    "checksum": ("a wrong checksum", {"checksum": 0x5555}),
    "no-ack": ("no ACK flag", {"flags": _PSH}),
    "null": ("no flags at all", {"flags": 0}),
    "ack-ahead": ("an ACK of bytes that were never sent", {"ack": 100_000}),
    "ack-old": ("an ACK far behind", {"ack": -200_000}),
    "md5": ("an MD5 signature that was not negotiated", {"options": b"\x13\x12" + bytes(16), "age": None}),
    "old-timestamp": ("a timestamp from before", {"age": 600_000}),
    "no-timestamp-syn": ("data in a repeated SYN", {"flags": _SYN, "seq": -1, "age": None}),
    "reset": ("the RST flag, outside of the window", {"flags": _RST | _ACK, "seq": -100, "ack": -100_000}),
    "far-ahead": ("a sequence number beyond the window", {"seq": 2_000_000}),
    "hop-limit": ("a hop limit that ends on the way", {"ttl": FAR}),
}
_KINDS: dict[str, tuple[str, int, Payload]] = {"http": ("HTTP", NGINX, _http), "tls": ("TLS", TLS, client_hello)}

LINES = (
    *(
        Line(f"decoy-{kind}-{key}", f"{title}: a decoy with {text}", partial(_decoy, port, payload, forged), raw=True)
        for kind, (title, port, payload) in _KINDS.items()
        for key, (text, forged) in _FORGED.items()
    ),
    *(
        Line(f"decoy-{kind}-{key}", f"{title}: a decoy with a hop limit that ends on the way, {text}", how, raw=True)
        for kind, (title, port, payload) in _KINDS.items()
        for key, text, how in (
            ("half", "in the place of the second half, before the first", partial(_half, port, payload)),
            ("junk", "that is of no protocol", partial(_junk, port, payload)),
            ("syn", "behind a SYN of its own that ends there too", partial(_other, False, 0, port, payload)),
            ("reset-syn", "behind a reset and a SYN that end there too", partial(_other, False, _RST, port, payload)),
            ("fin-syn-near", "behind a FIN and a SYN, ending where the client continues",
             partial(_other, True, _FIN | _ACK, port, payload)),
            ("syn-near", "behind a SYN, ending where the client continues", partial(_other, True, 0, port, payload)),
        )
    ),
    Line(
        "decoy-http-second",
        "HTTP, behind an allowed request: a decoy with a hop limit that ends on the way",
        _second_request,
        raw=True,
    ),
    *(
        Line(f"decoy-tls-large-{key}", f"TLS, a ClientHello in two segments: a decoy with {text}", how, raw=True)
        for key, text, how in (
            ("hop-limit", "a hop limit that ends on the way", partial(_decoy, TLS, _large_hello, {"ttl": FAR})),
            ("old-timestamp", "a timestamp from before", partial(_decoy, TLS, _large_hello, {"age": 600_000})),
            ("half", "a hop limit that ends on the way, in the place of the second half", partial(_half, TLS, _large_hello)),
        )
    ),
    Line("decoy-quic", "QUIC: a first flight whose hop limit ends on the way, and another with the same connection id", _quic),
)  # fmt: skip
