"""`http-host`: allow or deny by the host that the first HTTP/1 request names.

The first request decides for its connection: later ones on it may name another host, and are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nfq_agent.elements.gate import Gate
from nfq_agent.protocols import http1


class HttpHost(Gate):
    """Judges by `http_host`. HTTP/2 in clear text shows no name that can be read here."""

    parse = staticmethod(http1.parse)
    fact = "http_host"

    @classmethod
    def follows(cls, facts: Mapping[str, Any]) -> str | None:
        """HTTP/0.9 has no header fields; Python's server reads them there anyway."""
        return "a request of HTTP/0.9, behind which some servers read a Host" if facts.get("http_version") == "0.9" else None
