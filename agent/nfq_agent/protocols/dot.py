"""DNS over TLS (RFC 7858): what a host can know of it. The questions are encrypted; the connection is like any other TLS.

Sure where the client offers the application protocol "dot" (IANA, TLS ALPN protocol IDs); most clients offer none, so that TLS to
the port that is assigned to it counts as well. Steps: a fixed number, and one for each protocol offered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from nfq_agent.protocols import Protocol

PORT: Final = 853
_ALPN: Final = "dot"


def facts(hello: Mapping[str, Any], port: int | None) -> dict[str, Any]:
    """The fact `dot`, from the facts of a ClientHello and the server's port; nothing where it is not DNS over TLS."""
    if "tls_version" not in hello:
        return {}
    return {"dot": True} if port == PORT or _ALPN in hello.get("tls_alpn", ()) else {}


# Not a value of the fact "protocol", which stays "tls": a rule for TLS holds for it.
PROTOCOL: Final = Protocol("dot", facts=("dot",))
