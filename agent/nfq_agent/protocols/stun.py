"""STUN, and TURN and ICE that are built on it (RFC 8489 5, 14). Steps: one for each attribute, 32 at most."""

from __future__ import annotations

from struct import unpack_from
from typing import Any, Final

from nfq_agent.protocols import NO, Found, Protocol, Result, text

_COOKIE: Final = bytes.fromhex("2112a442")
_SOFTWARE: Final = 0x8022
_ATTRIBUTES: Final = 32


def datagram(data: bytes) -> Result:
    """stun_software is what the client says of itself."""
    if len(data) < 20 or data[0] & 0xC0 or data[4:8] != _COOKIE:
        return NO
    size = int.from_bytes(data[2:4], "big")
    if size % 4 or len(data) != 20 + size:
        return NO
    facts: dict[str, Any] = {"protocol": "stun"}
    at = 20
    for _ in range(_ATTRIBUTES):
        if at + 4 > len(data):
            break
        kind, length = unpack_from("!HH", data, at)
        if kind == _SOFTWARE:
            facts["stun_software"] = text(data[at + 4 : at + 4 + length])
        # Padded to four bytes (RFC 8489 14).
        at += 4 + length + (-length & 3)
    return Found(facts)


PROTOCOL: Final = Protocol("stun", facts=("stun_software",), headline="stun_software", datagram=datagram)
