"""POP3: the server's greeting and the client's first commands (RFC 1939), and the TLS behind STLS (RFC 2595 4).

Steps: one for each of the client's lines, 16 at most. Without the greeting nothing is reported: FTP has the same commands.
"""

from __future__ import annotations

import re
from typing import Any, Final

from nfq_agent.protocols import MORE, NO, Found, Protocol, Result, text
from nfq_agent.protocols.starttls import hand_over

_LINES: Final = 16
_LINE: Final = 512
_GREETING: Final = re.compile(rb"\+OK([^\r\n]*)\r?\n")
_COMMAND: Final = re.compile(rb"(CAPA|AUTH|USER|PASS|APOP|STLS|QUIT|NOOP)(?: [^\r\n]*)?\r?", re.IGNORECASE)
_WAITING: Final = frozenset((b"CAPA", b"NOOP"))


def parse(client: bytes, server: bytes) -> Result:
    """pop3_banner is the text of the greeting; tls_* follow a STLS."""
    if server[:3] != b"+OK"[: len(server)]:
        return NO
    greeting = _GREETING.match(server)
    if greeting is None:
        # The server speaks first: a client that has said a line without a greeting speaks another protocol.
        return MORE if len(server) < _LINE and b"\n" not in client and (not client or bool(server)) else NO
    facts: dict[str, Any] = {"protocol": "pop3", "pop3_banner": text(greeting[1].strip())}
    at = 0
    for number in range(_LINES):
        end = client.find(b"\n", at)
        if end < 0:
            return Found(facts, decided=False) if len(client) - at < _LINE else Found(facts)
        command = _COMMAND.fullmatch(client[at:end])
        if command is None:
            return Found(facts) if number else NO
        verb = command[1].upper()
        at = end + 1
        if verb == b"STLS":
            return hand_over(facts, client, at)
        if verb not in _WAITING:
            return Found(facts)
    return Found(facts)


PROTOCOL: Final = Protocol("pop3", facts=("pop3_banner",), headline="pop3_banner", parse=parse, carries=("tls",))
