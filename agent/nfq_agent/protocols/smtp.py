"""SMTP: greeting and EHLO (RFC 5321 4.1.1.1, 4.3.1), LMTP's LHLO (RFC 2033), and the TLS behind STARTTLS (RFC 3207).

Steps: one for each of the client's lines, 16 at most. A greeting of 220 alone says nothing: FTP has the same.
"""

from __future__ import annotations

import re
from typing import Any, Final

from nfq_agent.protocols import MORE, NO, Found, Protocol, Result, hostname, text
from nfq_agent.protocols.starttls import hand_over

_LINES: Final = 16
_LINE: Final = 512
_HELLO: Final = re.compile(rb"(EHLO|HELO|LHLO) ([\x21-\x7e]{1,255})[ \t]*", re.IGNORECASE)
_BEGINNING: Final = re.compile(rb"(?:E|EH|EHL|H|HE|HEL|L|LH|LHL)|(?:EHLO|HELO|LHLO)(?: [\x20-\x7e]*\r?)?", re.IGNORECASE)
_GREETING: Final = re.compile(rb"220(?:[ -]([\x20-\x7e]*))?\r?\n")
# What a client may still say before STARTTLS.
_WAITING: Final = frozenset((b"EHLO", b"HELO", b"LHLO", b"NOOP", b"RSET", b"HELP", b"STARTTLS"))


def parse(client: bytes, server: bytes) -> Result:
    """smtp_helo is the name that the client gives itself, smtp_banner the server's greeting; tls_* follow a STARTTLS."""
    if server and not _GREETING.match(server) and not b"220".startswith(server[:3]) and server[:3] != b"220":
        return NO
    if not client:
        return MORE
    at = client.find(b"\n")
    if at < 0:
        return MORE if len(client) < _LINE and _BEGINNING.fullmatch(client) else NO
    first = _HELLO.fullmatch(client[:at].rstrip(b"\r"))
    if first is None:
        return NO
    facts: dict[str, Any] = {"protocol": "smtp", "smtp_helo": hostname(first[2])}
    if greeting := _GREETING.match(server):
        facts["smtp_banner"] = text(greeting[1] or b"")
    at += 1
    for _ in range(_LINES):
        end = client.find(b"\n", at)
        if end < 0:
            return Found(facts, decided=False)
        verb = client[at:end].strip().partition(b" ")[0].upper()
        if verb not in _WAITING:
            return Found(facts)
        at = end + 1
        if verb == b"STARTTLS":
            return hand_over(facts, client, at)
    return Found(facts)


PROTOCOL: Final = Protocol(
    "smtp", facts=("smtp_helo", "smtp_banner"), headline="smtp_helo", hosts=("smtp_helo",), parse=parse, carries=("tls",)
)
