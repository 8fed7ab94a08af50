"""RDP: the connection request (MS-RDPBCGR 2.2.1.1; TPKT: RFC 1006), and the TLS behind it. Steps: a fixed number."""

from __future__ import annotations

from typing import Any, Final

from nfq_agent.protocols import MORE, NO, Found, Protocol, Result, text
from nfq_agent.protocols.starttls import hand_over

_TPKT: Final = b"\3\0"
_REQUEST: Final = 0xE0
_COOKIE: Final = b"Cookie: mstshash="
_LARGEST: Final = 512


def parse(client: bytes, server: bytes) -> Result:
    """rdp_user is the name in the cookie, which clients cut at nine characters; tls_* follow the request."""
    if client[:2] != _TPKT[: len(client)]:
        return NO
    if len(client) < 4:
        return MORE
    size = int.from_bytes(client[2:4], "big")
    if not 11 <= size <= _LARGEST:
        return NO
    if len(client) < size:
        return MORE if client[5:6] in (b"", bytes((_REQUEST,))) else NO
    # Length indicator, request, no reference of the server, a class of 0.
    if client[4] != size - 5 or client[5] != _REQUEST or client[6:8] != b"\0\0" or client[10]:
        return NO
    facts: dict[str, Any] = {"protocol": "rdp"}
    data = client[11:size]
    if data.startswith(_COOKIE) and (end := data.find(b"\r\n")) >= 0:
        facts["rdp_user"] = text(data[len(_COOKIE) : end])
    rest = client[size:]
    if rest[:1] == b"\x16":
        return hand_over(facts, client, size)
    # TYPE_RDP_NEG_REQ with a bit of PROTOCOL_SSL or PROTOCOL_HYBRID: TLS is to follow.
    asks_for_tls = data[-8:-7] == b"\1" and len(data) >= 8 and bool(data[-4] & 3)
    return Found(facts, decided=bool(rest) or not asks_for_tls)


PROTOCOL: Final = Protocol("rdp", facts=("rdp_user",), headline="rdp_user", parse=parse, carries=("tls",))
