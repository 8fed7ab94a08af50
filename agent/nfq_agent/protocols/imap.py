"""IMAP: the server's greeting and the client's first commands (RFC 9051 7.1, 6.1 to 6.3), and the TLS behind STARTTLS.

Steps: one for each of the client's lines, 16 at most.
"""

from __future__ import annotations

import re
from typing import Any, Final

from nfq_agent.protocols import MORE, NO, Found, Protocol, Result, text
from nfq_agent.protocols.starttls import hand_over

_LINES: Final = 16
_LINE: Final = 1024
_GREETING: Final = re.compile(rb"\* (?:OK|PREAUTH|BYE) ([\x20-\xff]*)\r?\n", re.IGNORECASE)
_GREETING_BEGINNING: Final = re.compile(
    rb"\*?(?:\* ?)?|\* (?:O|P[REAUTH]*|B[YE]*|OK|PREAUTH|BYE)(?: [\x20-\xff]*\r?)?", re.IGNORECASE
)
# RFC 9051 9, tag: any ASTRING-CHAR except "+".
_TAG: Final = rb"[!#$&',\-./0-9:;<=>?@A-Z\[\]^_`a-z|~]{1,32}"
_COMMAND: Final = re.compile(
    rb"(" + _TAG + rb") (CAPABILITY|NOOP|ID|STARTTLS|LOGIN|AUTHENTICATE|LOGOUT|ENABLE)(?: [^\r\n]*)?\r?", re.IGNORECASE
)
_COMMAND_BEGINNING: Final = re.compile(_TAG + rb"(?: [^\r\n]*\r?)?")
_WAITING: Final = frozenset((b"CAPABILITY", b"NOOP", b"ID"))


def parse(client: bytes, server: bytes) -> Result:
    """imap_banner is the text of the greeting; tls_* follow a STARTTLS."""
    facts: dict[str, Any] = {"protocol": "imap"}
    greeted = False
    if server:
        if greeting := _GREETING.match(server):
            facts["imap_banner"] = text(greeting[1])
            greeted = True
        elif len(server) > _LINE or not _GREETING_BEGINNING.fullmatch(server):
            return NO
    at = 0
    for number in range(_LINES):
        end = client.find(b"\n", at)
        if end < 0:
            if number or greeted:
                return Found(facts, decided=False)
            return MORE if not client or (len(client) < _LINE and _COMMAND_BEGINNING.fullmatch(client)) else NO
        command = _COMMAND.fullmatch(client[at:end])
        if command is None:
            return Found(facts) if number or greeted else NO
        verb = command[2].upper()
        at = end + 1
        if verb == b"STARTTLS":
            return hand_over(facts, client, at)
        if verb not in _WAITING:
            return Found(facts)
    return Found(facts)


PROTOCOL: Final = Protocol("imap", facts=("imap_banner",), parse=parse, carries=("tls",))
