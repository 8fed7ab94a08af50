"""One TCP connection, as elements know it: its addresses, and what was found out about it. Values only."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any


class Way(IntEnum):
    """The direction of bytes."""

    REQUEST = 0
    RESPONSE = 1


@dataclass(slots=True, eq=False)
class Connection:
    """What elements know of one connection.

    id: unique among all connections of all proxies of the host. client, original: address and port of the client and of
    the original destination (None where that is not known). upstream: where it goes. opened, now: seconds on one monotonic
    clock. requested, responded: bytes that came from each side. facts: what elements found out and share ("tls_sni").
    state: what an element keeps for itself, by the element. reason: why it was closed, empty for an orderly end.
    """

    id: str
    client: tuple[str, int]
    original: tuple[str, int] | None
    upstream: tuple[str, int]
    opened: float
    now: float
    requested: int = 0
    responded: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    state: dict[object, Any] = field(default_factory=dict)
    reason: str = ""

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of every log line about it, with the names that those of packets have."""
        (src, sport), (dst, dport) = self.client, self.upstream
        return {"connection": self.id, "proto": "tcp", "src": src, "sport": sport, "dst": dst, "dport": dport}
