"""`http-host`: allow or deny by the host that the first HTTP/1 request names.

The first request decides for its connection: later ones on it may name another host, and are not looked at.
"""

from __future__ import annotations

from dataclasses import replace

from nfq_agent.elements.gate import Gate
from nfq_agent.protocols import Found, Result, http1


def _parse(client: bytes, server: bytes) -> Result:
    """As http1.parse. HTTP/0.9 has no header fields; Python's server reads them there anyway, so another name may follow."""
    result = http1.parse(client, server)
    if isinstance(result, Found) and result.facts.get("http_version") == "0.9":
        return replace(result, facts={**result.facts, "conflict": "a request of HTTP/0.9, behind which some servers read a Host"})
    return result


class HttpHost(Gate):
    """Judges by `http_host`. HTTP/2 in clear text shows no name that can be read here."""

    parse = staticmethod(_parse)
    fact = "http_host"
