"""TLS behind the words of another protocol: STARTTLS and its like, and a ClientHello that a connection says later.

A server takes other commands before the one that asks for TLS, and some take lines that do not belong to their protocol. So
behind an opening, known or not, the client's bytes are searched for a ClientHello. Steps: one search of each segment.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

from nfq_agent.protocols import MORE, NO, Found, Parser, Result, tls

# A record of a handshake that begins with a ClientHello. The length of the hello, in bytes 6 to 8 unless the record is shorter,
# is below 3 << 16: OpenSSL takes 131,396 bytes, others less.
_RECORD: Final = rb"\x16\x03[\x00-\xff](?:\x00[\x01-\x03]\x01|[\x00-\xff]{2}\x01[\x00-\x02])"
HELLO: Final = re.compile(_RECORD)
# The same, or what may be the beginning of one, at the end.
_BEGINNING: Final = re.compile(rb"(" + _RECORD + rb")|\x16(?:\x03[\x00-\xff]{0,3}|\x03[\x00-\xff]{3}\x01)?\Z")
# Bytes of a hello in which it does not show yet.
HELLO_START: Final = 6
# Bytes searched of a connection that is neither text nor of a protocol that hands over to TLS.
_SEARCHED: Final = 16384
_TEXT: Final = re.compile(rb"[\t\r\n\x20-\x7e]*")
_LOOKED_AT: Final = 64


def handed_over(facts: Mapping[str, Any], inner: Result, before: int, carries: bool = True) -> Found:
    """The facts of a protocol with those of the ClientHello behind it.

    inner: of tls.parse. before: bytes before the hello. carries: the protocol is known to hand over to TLS.
    """
    if not isinstance(inner, Found):
        return Found(dict(facts), decided=inner is not MORE)
    if "conflict" in inner.facts:
        # It hides a server name, whatever the protocol was taken for.
        protocol = facts["protocol"] if carries else "tls"
        return Found({**facts, "protocol": protocol, "conflict": inner.facts["conflict"]}, then=ended)
    then = None if inner.then is None else partial(_second_hello, dict(facts), inner.then)
    return Found({**inner.facts, **facts}, inner.decided, inner.done, used=before + inner.used, then=then)


def hand_over(facts: Mapping[str, Any], client: bytes, before: int) -> Found:
    """The facts of a protocol that hands over to TLS, with those of the ClientHello there. before: bytes before it."""
    return handed_over(facts, tls.parse(client[before:], b""), before)


def lookout(facts: Mapping[str, Any], opening: bytes, carries: bool, before: bytes = b"") -> Parser:
    """Searches what follows for a ClientHello.

    facts: of the opening. carries: its protocol hands over to TLS. before: bytes before what follows, which may begin a hello.
    """
    is_text = _TEXT.fullmatch(opening[:_LOOKED_AT]) is not None
    return partial(_search, dict(facts), None if carries or (is_text and not facts) else _SEARCHED, before)


def is_search(parsers: tuple[Parser, ...]) -> bool:
    """Whether these are what `lookout` returns."""
    return len(parsers) == 1 and isinstance(parsers[0], partial) and parsers[0].func is _search


def ended(client: bytes, server: bytes = b"") -> Found:
    """Nothing more is read."""
    return Found({})


def _second_hello(facts: Mapping[str, Any], then: Parser, client: bytes, server: bytes = b"") -> Result:
    """What follows a ClientHello: see tls.after_hello."""
    result = then(client, server)
    if not isinstance(result, Found):
        return result
    if result.facts:
        return handed_over(facts, result, 0)
    return Found({}, used=result.used, skip=result.skip, then=result.then and partial(_second_hello, facts, result.then))


def _search(facts: Mapping[str, Any], left: int | None, carried: bytes, client: bytes, server: bytes = b"") -> Result:
    """left: bytes that are still searched, None for all. carried: the bytes before, which may begin a hello."""
    data = carried + client
    hit = _BEGINNING.search(data)
    at = len(data) if hit is None else hit.start()
    behind = at - len(carried)
    if hit is not None and hit[1] and behind <= 0:
        return _read(facts, left, carried, client, at)
    left = None if left is None else left - len(client)
    if left is not None and left <= 0:
        return Found({})
    if hit is None or not hit[1]:
        return Found({}, used=len(client), then=partial(_search, facts, left, data[at:]))
    return Found({}, used=behind, then=partial(_search, facts, left, b""))


def _read(facts: Mapping[str, Any], left: int | None, carried: bytes, client: bytes, at: int) -> Result:
    """The ClientHello that begins in the bytes before, or with the next one."""
    inner = tls.parse((carried + client)[at:], b"")
    if inner is MORE:
        return MORE
    if inner is NO:
        rest = carried[at + 1 :]
        return Found({}, used=0 if carried else 1, then=partial(_search, facts, left, rest))
    return handed_over(facts, inner, at - len(carried), carries=left is None and bool(facts))
