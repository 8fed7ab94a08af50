"""NTP: a client's request (RFC 5905 7.3). Steps: a fixed number."""

from __future__ import annotations

from typing import Final

from nfq_agent.protocols import NO, Found, Protocol, Result

_CLIENT: Final = 3
# The header alone, and with a key and a digest of 16 or 20 bytes.
_SIZES: Final = frozenset((48, 68, 72))
_POLL: Final = range(18)


def datagram(data: bytes) -> Result:
    """ntp_version, 3 or 4."""
    if len(data) not in _SIZES or data[0] & 7 != _CLIENT or data[0] >> 3 & 7 not in (3, 4):
        return NO
    # Stratum and poll as a client may have them; a request has the time at which it was sent (or a number in its place).
    if data[1] > 16 or data[2] not in _POLL or not any(data[40:48]):
        return NO
    return Found({"protocol": "ntp", "ntp_version": str(data[0] >> 3 & 7)})


PROTOCOL: Final = Protocol("ntp", facts=("ntp_version",), datagram=datagram)
