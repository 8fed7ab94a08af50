"""The beginning of an HTTP request's body. A server that does not read a body takes it for the next request.

Python's http.server is one: a body of `GET / HTTP/1.1` and a Host field is answered there. So requests at the beginning of a body
are messages as well, and one that does not end within the body is a conflict. Other bodies are skipped.

Steps: one search for a line end and one split of what stands before it, and those of a request.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Final

from nfq_agent.protocols import MORE, NO, WAIT, Found, Parser, Result

_METHODS: Final = frozenset((b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"TRACE", b"CONNECT"))
# Any other word that may be a method: programs write methods of their own in capital letters.
_METHOD: Final = re.compile(rb"[A-Z]{3,20}")
_PART: Final = re.compile(rb"[A-Z]{1,20}")
# A server skips empty lines, and some skip spaces, before a request.
_BEFORE: Final = b"\r\n \t"
_GAPS: Final = bytes.maketrans(b"\t\x0b\x0c\r\x1c\x1d\x1e\x1f\x85\xa0", b" " * 10)
_HTTP: Final = b"HTTP/"
# Bytes of the body that are kept to be compared with what is sent again, where its first byte does not decide.
_COMPARED: Final = 1024
_CONFLICT: Final = Found({"protocol": "http", "conflict": "a body that begins like a request"})


def body(length: int, then: Parser, parse: Parser) -> Parser:
    """Reads a body of known length, at least one byte, and lets `then` read what follows it. parse: reads a request."""
    return partial(_body, length, then, parse)


def is_request_line(data: bytes) -> bool | None:
    """Whether bytes begin with a request line that some server answers; None where more bytes may make it one."""
    line = data.lstrip(_BEFORE)
    end = line.find(b"\n")
    text = (line if end < 0 else line[:end]).translate(_GAPS)
    words = [word for word in text.split(b" ") if word]
    if not words:
        return None if end < 0 else False
    method, rest = words[0], words[1:]
    if end >= 0:
        # Python's server takes a GET of two words, and whatever stands between the target and the version.
        many = any(word.upper().startswith(_HTTP) for word in rest[1:])
        known = method in _METHODS or _METHOD.fullmatch(method) is not None
        return known and (many or (method == b"GET" and len(rest) == 1))
    if not rest and text[-1:] != b" ":
        return None if _PART.fullmatch(method) else False
    if method in _METHODS:
        return None
    if _METHOD.fullmatch(method) is None:
        return False
    third = rest[1].upper() if len(rest) > 1 else b""
    return None if _HTTP.startswith(third) or third.startswith(_HTTP) else False


def _body(length: int, then: Parser, parse: Parser, client: bytes, server: bytes = b"") -> Result:  # a Parser
    start = client[:length]
    found = is_request_line(start)
    if found:
        return _inner(start, length, then, parse)
    if found is None:
        if len(start) < length:
            return WAIT
        method, gap, _ = start.lstrip(_BEFORE).translate(_GAPS).partition(b" ")
        if gap and method in _METHODS:
            return _CONFLICT
        # The method's first letters, or nothing that shows: what follows continues it.
        return Found({}, used=length, then=partial(_behind, then))
    used = 1 if start[:1] not in (b"\r", b"\n", b" ", b"\t") and not start[:1].isupper() else min(len(start), _COMPARED)
    return Found({}, used=used, skip=length - used, then=then)


def _inner(start: bytes, length: int, then: Parser, parse: Parser) -> Result:
    """The body is a request. start: what has come of it."""
    found = parse(start, b"")
    if (found is MORE or (isinstance(found, Found) and not found.decided)) and len(start) < length:
        return WAIT
    # Servers differ in how they read one with a body of its own, or one that changes the protocol.
    if not isinstance(found, Found) or not found.decided or found.then is not parse:
        return _CONFLICT
    left = length - found.used
    return Found(found.facts, used=found.used, then=body(left, then, parse) if left else then)


def _behind(then: Parser, client: bytes, server: bytes = b"") -> Result:
    """What stands behind a body that may be the beginning of a request line."""
    result = then(client, server)
    return _CONFLICT if result is NO else result
