"""PostgreSQL: the startup message, and the TLS behind an SSLRequest.

Source: PostgreSQL documentation, chapter "Frontend/Backend Protocol", "Message Formats": StartupMessage, SSLRequest,
GSSENCRequest, CancelRequest. Steps: one for each request before it (4 at most) and for each parameter (64 at most).
"""

from __future__ import annotations

from typing import Any, Final

from nfq_agent.protocols import MORE, NO, Found, Protocol, Result, text
from nfq_agent.protocols.starttls import hand_over

_SSL: Final = bytes.fromhex("00000008 04d2162f")
_GSS: Final = bytes.fromhex("00000008 04d21630")
_CANCEL: Final = bytes.fromhex("04d2162e")
_VERSION: Final = b"\0\3"
_REQUESTS: Final = 4
_PARAMETERS: Final = 64
# MAX_STARTUP_PACKET_LENGTH, src/include/libpq/pqcomm.h
_LIMIT: Final = 10000


def parse(client: bytes, server: bytes) -> Result:  # noqa: C901  # one branch for each kind of message
    """pg_user and pg_database as the startup message names them; tls_* where the client switched to TLS."""
    facts: dict[str, Any] = {"protocol": "postgresql"}
    at = 0
    for _ in range(_REQUESTS):
        head = client[at : at + 8]
        if not _SSL.startswith(head) and not _GSS.startswith(head):
            break
        if len(head) < 8:
            # Direct TLS, or a client that waits: what was asked before is certain.
            return Found(facts, decided=False) if at else MORE
        at += 8
    else:
        return NO
    if at and client[at : at + 1] == b"\x16":
        return hand_over(facts, client, at)
    unknown: Result = Found(facts) if at else NO
    size = int.from_bytes(client[at : at + 4], "big")
    if len(client) < at + 8:
        partial = client[at:]
        if partial[:2] not in (b"", b"\0", b"\0\0") or not _VERSION.startswith(partial[4:6]):
            return unknown
        return Found(facts, decided=False) if at else MORE
    if not 8 <= size <= _LIMIT:
        return unknown
    code = client[at + 4 : at + 8]
    if code == _CANCEL and 16 <= size <= 272:
        return Found(facts)
    # 3.0, and 3.2 since PostgreSQL 18.
    if code[:2] != _VERSION or code[2] or code[3] > 15:
        return unknown
    if len(client) < at + size:
        return Found(facts, decided=False) if at else MORE
    fields = client[at + 8 : at + size].split(b"\0", 2 * _PARAMETERS + 2)
    # Pairs, each string ended by a zero, and one more zero at the end.
    if fields[-2:] != [b"", b""] or len(fields) % 2:
        return unknown
    for key, value in zip(fields[0:-2:2], fields[1:-2:2], strict=True):
        if key == b"user":
            facts["pg_user"] = text(value)
        elif key == b"database":
            facts["pg_database"] = text(value)
    if "pg_user" not in facts:
        return unknown
    # Without a database the server takes the user's name.
    facts.setdefault("pg_database", facts["pg_user"])
    return Found(facts)


PROTOCOL: Final = Protocol("postgresql", facts=("pg_user", "pg_database"), headline="pg_database", parse=parse, carries=("tls",))
