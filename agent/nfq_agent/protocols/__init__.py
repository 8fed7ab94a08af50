"""Parsers of openings: what a connection's first bytes say about it. Bytes in, facts out; no I/O, no clock, no state.

Every parser has the same signature, `parse(client, server)`: the bytes that each side has sent so far, from the first. It
answers NO (these bytes cannot be that protocol), MORE (they may be, the bytes end too early) or Found. It never raises,
whatever the bytes, and never reports what the bytes do not say. Each module names its bound on the steps of a parse.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any, Final


class NoMatch(Enum):
    """The result of a parser without facts: not this protocol, or not yet."""

    NO = "no"
    MORE = "more"


NO: Final = NoMatch.NO
MORE: Final = NoMatch.MORE


@dataclass(frozen=True, slots=True)
class Found:
    """What is certain.

    facts: by attribute name, "protocol" always among them; empty if the bytes are not a message and are only skipped. A message
    that servers read in different ways has the fact "conflict", with the reason, and no name.
    decided: False while a name may still come that a policy would wait for. done: False while the server may still add
    something, though all that decides is there. used: bytes of the client that the message takes, without its body.
    skip: bytes of its body. then: reads what the client sends after that; None where nothing more is to be read.
    needs: bytes of the client before which a message that is not decided says nothing more; 0 where that is not known.
    """

    facts: dict[str, Any]
    decided: bool = True
    done: bool = True
    used: int = 0
    skip: int = 0
    then: Parser | None = None
    needs: int = 0


Result = NoMatch | Found
# More bytes of the message that was found before are needed to tell where it ends.
WAIT: Final = Found({}, decided=False)
# What both sides have sent so far; for a later message, the client's bytes from its first, and nothing of the server.
Parser = Callable[[bytes, bytes], Result]


def parse_first(parsers: tuple[Parser, ...], client: bytes, server: bytes) -> tuple[tuple[Parser, ...], Found | None]:
    """What the first parser finds that finds anything, and the parsers that are left.

    Left is the parser that found something, else those that answered MORE.
    """
    remaining: list[Parser] = []
    for parser in parsers:
        result = parser(client, server)
        if result is NO:
            continue
        if isinstance(result, Found):
            return (parser,), result
        remaining.append(parser)
    return tuple(remaining), None


@dataclass(frozen=True, slots=True)
class Protocol:
    """What a module of this package declares; protocols/known.py collects the declarations.

    name: the value of the fact "protocol". facts: the facts that its messages set. headline: the fact that names a flow in
    one word, "" for none. hosts: the facts that are host names, compared without case. parse: reads the opening over TCP,
    None for a protocol of UDP alone. datagram: reads one UDP datagram, NO for what is not certainly of the protocol.
    changes: the facts that a later message of the same connection replaces. carries: protocols that it hands over to, whose
    facts it sets as well.
    """

    name: str
    facts: tuple[str, ...] = ()
    headline: str = ""
    hosts: tuple[str, ...] = ()
    parse: Parser | None = None
    datagram: Callable[[bytes], Result] | None = None
    changes: tuple[str, ...] = ()
    carries: tuple[str, ...] = ()


# Longer text from the wire is cut: a fact is for matching and for a log line.
TEXT_LIMIT: Final = 256
_ESCAPES: Final = {byte: f"\\x{byte:02x}" for byte in (*range(0x20), *range(0x7F, 0x100))} | {0x5C: "\\\\"}


def text(data: bytes, limit: int = TEXT_LIMIT) -> str:
    """Bytes as printable ASCII; anything else, and the backslash, is escaped, so that no two inputs look the same."""
    shown = data[:limit].decode("latin-1")
    return shown if shown.isascii() and shown.isprintable() and "\\" not in shown else shown.translate(_ESCAPES)


# Letters, digits, hyphen and underscore in labels that are not empty; a dot at the end is allowed (RFC 1034 3.1).
_HOST_NAME: Final = re.compile(rb"(?=.{1,254}\Z)[A-Za-z0-9_\-]{1,63}(?:\.[A-Za-z0-9_\-]{1,63})*\.?")


@lru_cache(1024)
def host_name(data: bytes) -> str | None:
    """A host name in small letters, without the dot at its end; None if it is not a host name."""
    if _HOST_NAME.fullmatch(data) is None:
        return None
    return data.decode("ascii").lower().rstrip(".")


def hostname(data: bytes) -> str:
    """A host name for matching: in small letters, without the dot at its end (RFC 4343, RFC 1034 3.1)."""
    name = text(data).lower()
    return name[:-1] if name.endswith(".") and len(name) > 1 else name
