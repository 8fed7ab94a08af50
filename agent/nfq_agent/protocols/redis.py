"""Redis: the first command, an array of bulk strings (Redis serialization protocol specification, RESP2 and RESP3).

Steps: a fixed number. Inline commands ("PING" and a line end) are not told from other text: they are not identified as Redis.
"""

from __future__ import annotations

import re
from typing import Final

from nfq_agent.protocols import MORE, NO, Found, Protocol, Result, text

_FIRST: Final = re.compile(rb"\*([1-9][0-9]{0,6})\r\n\$([1-9][0-9]?)\r\n")
_BEGINNING: Final = re.compile(rb"\*(?:[1-9][0-9]{0,6}(?:\r(?:\n(?:\$(?:[1-9][0-9]?(?:\r\n?)?)?)?)?)?)?")
_NAME: Final = re.compile(rb"[A-Za-z][A-Za-z0-9._\-]*")


def parse(client: bytes, server: bytes) -> Result:
    """redis_command is the first command's name in capitals; its arguments, which may be a password, are not read."""
    if not client:
        return MORE
    first = _FIRST.match(client)
    if first is None:
        return MORE if _BEGINNING.fullmatch(client) else NO
    size = int(first[2])
    end = first.end() + size
    if len(client) < end + 2:
        return MORE if not client[first.end() :] or _NAME.match(client, first.end()) else NO
    command = client[first.end() : end]
    if client[end : end + 2] != b"\r\n" or not _NAME.fullmatch(command):
        return NO
    return Found({"protocol": "redis", "redis_command": text(command).upper()})


PROTOCOL: Final = Protocol("redis", facts=("redis_command",), headline="redis_command", parse=parse)
