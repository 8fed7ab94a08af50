"""A connection in front of a policy, segment by segment, with headers that a test forges."""

from __future__ import annotations

import struct
from typing import Any

from openings import client_hello

from nfq_agent.packet import Packet
from nfq_agent.testing import Bench, ip_packet, tcp

CLIENT, SERVER = "192.0.2.1:40000", "198.51.100.1:443"
CLIENT6, SERVER6 = "[2001:db8::1]:40000", "[2001:db8::2]:443"
ISN, PEER = 1000, 77000
ALLOWED, DENIED = client_hello("a.good.test"), client_hello("a.evil.test")
POLICIES: dict[str, dict[str, Any]] = {
    kind: {"default": default, "rule": [{"action": action, key: name} for key in ("tls_sni", "http_host")]}
    for kind, default, action, name in (
        ("allow-list", "drop", "accept", "*.good.test"), ("block-list", "accept", "drop", "*.evil.test")
    )
}  # fmt: skip
STAMP = struct.Struct("!BBBBII")


def request(host: str) -> bytes:
    return f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()


def made(
    data: bytes, seq: int, *, flags: str = "PA", options: bytes = b"", family: int = 4, wrong: bool = False, ack: int = PEER + 1
) -> Packet:
    """A segment of the client with options of its own."""
    src, dst = (CLIENT, SERVER) if family == 4 else (CLIENT6, SERVER6)
    plain = tcp(src, dst, data, flags=flags, seq=seq, ack=ack).payload
    start = 20 if family == 4 else 40
    options += b"\1" * (-len(options) % 4)
    header = bytearray(plain[start : start + 20])
    header[12] = 5 + len(options) // 4 << 4
    ends = (plain[12:16], plain[16:20]) if family == 4 else (plain[8:24], plain[24:40])
    packet = bytearray(ip_packet(ends[0], ends[1], 6, bytes(header) + options + data))
    if wrong:
        packet[start + 16] ^= 0x55
    return Packet(bytes(packet))  # fmt: skip


def opened(policy: str, *, family: int = 4, both: bool = True, options: bytes = b"", isn: int = ISN) -> Bench:
    bench = Bench("policy", before=[("dpi", {})], **POLICIES[policy])
    src, dst = (CLIENT, SERVER) if family == 4 else (CLIENT6, SERVER6)
    bench.assert_accepted(made(b"", isn, flags="S", options=options, family=family))
    if both:
        bench.assert_accepted(tcp(dst, src, flags="SA", seq=PEER, ack=isn + 1))
    bench.assert_accepted(made(b"", isn + 1, flags="A", options=options, family=family))
    return bench


def stamp(value: int) -> bytes:
    return STAMP.pack(1, 1, 8, 10, value, 0)
