"""`sni`: allow or deny by the server name of a TLS ClientHello (RFC 6066, 3). Nothing is decrypted."""

from __future__ import annotations

from nfq_agent.elements.gate import Gate
from nfq_agent.protocols import tls


class ServerName(Gate):
    """Judges by `tls_sni`. With Encrypted ClientHello that is the outer name."""

    parse = staticmethod(tls.parse)
    fact = "tls_sni"
