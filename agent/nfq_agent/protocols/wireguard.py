"""WireGuard: the handshake messages (wireguard.com/papers/wireguard.pdf, 5.4.2 and 5.4.3). Steps: a fixed number."""

from __future__ import annotations

from typing import Final

from nfq_agent.protocols import NO, Found, Protocol, Result

# Type with three reserved bytes, and the exact size: initiation and response.
_MESSAGES: Final = {b"\1\0\0\0": 148, b"\2\0\0\0": 92}


def datagram(data: bytes) -> Result:
    """A handshake; its encrypted parts are not read."""
    return Found({"protocol": "wireguard"}) if _MESSAGES.get(data[:4]) == len(data) else NO


PROTOCOL: Final = Protocol("wireguard", datagram=datagram)
