"""Counts the connections of each source, if their number is limited. No I/O."""

from __future__ import annotations

import socket
from typing import Final

# An IPv6 host usually has all addresses of such a network (RFC 4291, 2.5.4).
_V6_BYTES: Final = 8


class Sources:
    """Connections by source: an IPv4 address, or the first 64 bits of an IPv6 address."""

    def __init__(self, most: int) -> None:
        """most: connections of one source; 0 means no limit, and nothing is counted."""
        self.most = most
        self._counts: dict[str | bytes, int] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def refuses(self, host: str) -> str:
        """Why a new connection from this address is refused; empty if it is not."""
        if not self.most or self._counts.get(_source(host), 0) < self.most:
            return ""
        return f"its source has {self.most} connections already (max_per_source)"

    def opened(self, host: str) -> None:
        """A connection from this address."""
        if self.most:
            source = _source(host)
            self._counts[source] = self._counts.get(source, 0) + 1

    def closed(self, host: str) -> None:
        """One less."""
        if self.most:
            source = _source(host)
            if (count := self._counts[source]) > 1:
                self._counts[source] = count - 1
            else:
                del self._counts[source]


def _source(host: str) -> str | bytes:
    return socket.inet_pton(socket.AF_INET6, host.partition("%")[0])[:_V6_BYTES] if ":" in host else host
