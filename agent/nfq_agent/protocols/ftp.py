"""FTP: the server's greeting and the client's first commands (RFC 959), and the TLS behind AUTH (RFC 4217 4).

Steps: one for each of the client's lines, 16 at most. Without the greeting nothing is reported: POP3 has the same commands.
"""

from __future__ import annotations

import re
from typing import Any, Final

from nfq_agent.protocols import MORE, NO, Found, Protocol, Result, text
from nfq_agent.protocols.starttls import hand_over

_LINES: Final = 16
_LINE: Final = 512
_GREETING: Final = re.compile(rb"220[ -]([^\r\n]*)\r?\n")
_COMMAND: Final = re.compile(rb"(USER|AUTH|FEAT|SYST|OPTS|CLNT|HOST|PBSZ|PROT|QUIT)(?: ([^\r\n]*))?\r?", re.IGNORECASE)
_WAITING: Final = frozenset((b"FEAT", b"SYST", b"OPTS", b"CLNT", b"HOST"))


def parse(client: bytes, server: bytes) -> Result:
    """ftp_banner is the text of the greeting, ftp_user the name that logs in; tls_* follow an AUTH TLS."""
    if server[:3] != b"220"[: len(server)]:
        return NO
    greeting = _GREETING.match(server)
    if greeting is None:
        # The server speaks first: a client that has said a line without a greeting speaks another protocol.
        return MORE if len(server) < _LINE and b"\n" not in client and (not client or bool(server)) else NO
    facts: dict[str, Any] = {"protocol": "ftp", "ftp_banner": text(greeting[1].strip())}
    at = 0
    for number in range(_LINES):
        end = client.find(b"\n", at)
        if end < 0:
            # SMTP has the same greeting: it shows with the first line.
            return Found(facts, decided=False) if number else (MORE if len(client) < _LINE else NO)
        command = _COMMAND.fullmatch(client[at:end])
        if command is None:
            return Found(facts) if number else NO
        verb = command[1].upper()
        at = end + 1
        if verb == b"AUTH" and (command[2] or b"").upper() in (b"TLS", b"TLS-C", b"SSL"):
            return hand_over(facts, client, at)
        if verb == b"USER":
            facts["ftp_user"] = text(command[2] or b"")
        if verb not in _WAITING:
            return Found(facts)
    return Found(facts)


PROTOCOL: Final = Protocol("ftp", facts=("ftp_banner", "ftp_user"), headline="ftp_banner", parse=parse, carries=("tls",))
