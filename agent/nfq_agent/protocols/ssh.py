"""SSH: the identification strings of both sides (RFC 4253 4.2).

Steps: one for each line that a server sends before its own, 50 at most.
"""

from __future__ import annotations

from typing import Final

from nfq_agent.protocols import MORE, NO, Found, NoMatch, Protocol, Result, text

_PREFIX: Final = b"SSH-"
# The string has 255 characters at most with its end; only a server may send lines before it, and never needs many.
_LIMIT: Final = 255
_LINES: Final = 50


def parse(client: bytes, server: bytes) -> Result:
    """ssh_banner is the server's string, ssh_client_banner the client's."""
    ours = _banner(client, 1)
    theirs = _banner(server, _LINES)
    facts = {"protocol": "ssh"}
    if isinstance(ours, str):
        facts["ssh_client_banner"] = ours
    if isinstance(theirs, str):
        facts["ssh_banner"] = theirs
    if len(facts) > 1:
        return Found(facts, done=len(facts) == 3 or ours is NO or theirs is NO)
    # A server that says something else first may still be one; a client may not.
    if ours is NO or theirs is NO:
        return NO
    return MORE


def _banner(data: bytes, lines: int) -> str | NoMatch:
    at = 0
    for _ in range(lines):
        if not data.startswith(_PREFIX, at):
            rest = data[at : at + len(_PREFIX)]
            if len(rest) < len(_PREFIX) and _PREFIX.startswith(rest):
                return MORE
            # Text only before the string: "lines [...] encoded in UTF-8", ended by CR LF.
            end = data.find(b"\n", at)
            if lines == 1 or b"\0" in data[at : end if end >= 0 else None]:
                return NO
            if end < 0:
                return MORE if len(data) - at < 1024 else NO
            at = end + 1
            continue
        end = data.find(b"\n", at, at + _LIMIT)
        if end < 0:
            return MORE if len(data) - at < _LIMIT else NO
        line = data[at:end].rstrip(b"\r")
        # SSH-protoversion-softwareversion; 1.99 is a 2.0 server that still knows 1 (RFC 4253 5.1).
        version, dash, software = line[len(_PREFIX) :].partition(b"-")
        if not dash or not software or version[:2] not in (b"1.", b"2."):
            return NO
        return text(line)
    return NO


PROTOCOL: Final = Protocol("ssh", facts=("ssh_banner", "ssh_client_banner"), headline="ssh_banner", parse=parse)
