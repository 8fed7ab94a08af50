"""XMPP: the stream header (RFC 6120 4.7), and the TLS behind STARTTLS (5.4.2). Steps: a fixed number of regular expressions."""

from __future__ import annotations

import re
from typing import Any, Final

from nfq_agent.protocols import MORE, NO, Found, Protocol, Result, text
from nfq_agent.protocols.starttls import hand_over

_LIMIT: Final = 2048
_BEGINNINGS: Final = (b"<?xml ", b"<stream:stream ")
_HEADER: Final = re.compile(rb"(?:<\?xml [^>]{0,100}\?>\s*)?<stream:stream (?P<rest>[^>]{0,1000})>\s*")
_BEFORE: Final = re.compile(rb"<\?xml [^>]{0,100}\?>\s*")
_TO: Final = re.compile(rb"""(?:^|\s)to=(?:'([^']{1,255})'|"([^"]{1,255})")""")
_STARTTLS: Final = re.compile(rb"<starttls [^>]{0,200}?(?:/>|>\s*</starttls>)\s*")


def parse(client: bytes, server: bytes) -> Result:
    """xmpp_to is the host that the client names; tls_* follow a STARTTLS."""
    if not any(client.startswith(each[: len(client)]) for each in _BEGINNINGS):
        return NO
    header = _HEADER.match(client)
    if header is None:
        before = _BEFORE.match(client)
        other = before is not None and not client[before.end() :].startswith(_BEGINNINGS[1][: len(client) - before.end()])
        return NO if other or len(client) >= _LIMIT else MORE
    facts: dict[str, Any] = {"protocol": "xmpp"}
    if (to := _TO.search(header["rest"])) is not None:
        facts["xmpp_to"] = text(to[1] or to[2]).lower()
    rest = client[header.end() :]
    starttls = _STARTTLS.match(rest)
    if starttls is not None:
        return hand_over(facts, client, header.end() + starttls.end())
    return Found(facts, decided=bool(rest) and not b"<starttls ".startswith(rest[:10]) and len(rest) < _LIMIT)


PROTOCOL: Final = Protocol("xmpp", facts=("xmpp_to",), headline="xmpp_to", hosts=("xmpp_to",), parse=parse, carries=("tls",))
