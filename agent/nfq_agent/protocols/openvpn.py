"""OpenVPN: the client's first packet (OpenVPN's doc/doc_protocol_overview.h and src/openvpn/ssl_pkt.h). Steps: a fixed number.

It has an opcode, a session id of 8 bytes, and either in clear, or behind a digest (tls-auth), no acknowledgement and the
packet number 0; with tls-crypt these two are encrypted, behind a packet counter that begins with 1.
"""

from __future__ import annotations

from typing import Final

from nfq_agent.protocols import MORE, NO, Found, Protocol, Result

# P_CONTROL_HARD_RESET_CLIENT_V2 << 3, key 0
_RESET: Final = 0x38
_PLAIN: Final = 14
# Digests of 16 (MD5), 20 (SHA-1), 32 (SHA-256) and 64 bytes (SHA-512), with a packet counter and the time.
_WITH_DIGEST: Final = frozenset(_PLAIN + 8 + digest for digest in (16, 20, 32, 64))
_CRYPT: Final = _PLAIN + 8 + 32
_FIRST: Final = bytes(5)


def datagram(data: bytes) -> Result:
    """The opening over UDP."""
    size = len(data)
    if size < _PLAIN or data[0] != _RESET:
        return NO
    clear = size == _PLAIN or size in _WITH_DIGEST
    if (clear and data[-5:] == _FIRST) or (size == _CRYPT and data[9:13] == b"\0\0\0\1"):
        return Found({"protocol": "openvpn"})
    return NO


def parse(client: bytes, server: bytes) -> Result:
    """The same over TCP, two bytes of length before it."""
    size = int.from_bytes(client[:2], "big")
    if (len(client) >= 2 and not _PLAIN <= size <= max(_WITH_DIGEST)) or client[2:3] not in (b"", bytes((_RESET,))):
        return NO
    if len(client) < 2 + size or len(client) < 3:
        return MORE
    return datagram(client[2 : 2 + size])


PROTOCOL: Final = Protocol("openvpn", parse=parse, datagram=datagram)
