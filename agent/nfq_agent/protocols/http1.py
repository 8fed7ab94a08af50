"""HTTP/1: request line and header fields (RFC 9112), and the preface of HTTP/2 in clear text (RFC 9113 3.4).

Steps: one for each line of the head, and a few passes of `find` and one regular expression without backtracking over it.
"""

from __future__ import annotations

import re
from typing import Any, Final

from nfq_agent.protocols import MORE, NO, Found, Protocol, Result, hostname, text

_TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
# RFC 9112 3: method SP request-target SP HTTP-version. No method in the IANA registry is longer than 24 letters.
_LINE: Final = re.compile(rb"(" + _TOKEN + rb"{1,24}) ([\x21-\x7e\x80-\xff]+) HTTP/1\.([01])\r?\n")
_BEGINNING: Final = re.compile(_TOKEN + rb"{1,24}(?: [\x21-\x7e\x80-\xff]*(?: [HTP/1.0]{0,8}\r?)?)?")
_END: Final = re.compile(rb"\n\r?\n")
_HOST: Final = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[^\s:/@\[\]]*)(?::[0-9]*)?")
_ABSOLUTE: Final = re.compile(rb"[A-Za-z][A-Za-z0-9+.\-]*://(?:[^/?#@]*@)?([^/?#]*)")
_HTTP2: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_PATH_LIMIT: Final = 1024
_FACTS: Final = (
    "http_host", "http_host_conflict", "http_method", "http_path", "http_user_agent", "http_version",
)  # fmt: skip


def parse(client: bytes, server: bytes) -> Result:
    """The first request. http_path is the target without its query, http_host has neither port nor capital letters.

    Two hosts that differ (two Host fields, or a target that names another) are no name: http_host_conflict says so.
    """
    # A server ignores empty lines before the request (RFC 9112 2.2).
    data = client.lstrip(b"\r\n") if client[:1] in (b"\r", b"\n") else client
    if not data:
        return MORE
    line = _LINE.match(data)
    if line is None:
        if _HTTP2.startswith(data[: len(_HTTP2)]):
            complete = len(data) >= len(_HTTP2)
            return Found({"protocol": "http", "http_version": "2"}) if complete else MORE
        return MORE if b"\n" not in data and _BEGINNING.fullmatch(data) else NO
    method, target, minor = line.groups()
    facts: dict[str, Any] = {
        "protocol": "http",
        "http_version": "1." + minor.decode(),
        "http_method": method.decode("ascii"),
        "http_path": _path(target),
    }
    # The line's own end may be the beginning of the empty line.
    end = _END.search(data, line.end() - 1)
    if end is None:
        return Found(facts, decided=False)
    hosts: list[bytes] = []
    if method == b"CONNECT":
        hosts.append(target)
    elif absolute := _ABSOLUTE.match(target):
        hosts.append(absolute[1])
    for field in data[line.end() : end.start()].split(b"\n"):
        name, colon, value = field.partition(b":")
        if not colon:
            continue
        # Space before the colon is refused by servers or ignored by them (RFC 9112 5.1): the name is looked at anyway.
        name = name.strip().lower()
        if name == b"host":
            hosts.append(value.strip())
        elif name == b"user-agent" and "http_user_agent" not in facts:
            facts["http_user_agent"] = text(value.strip())
    names = {host for each in hosts if (host := _host(each)) is not None}
    if len(names) == 1:
        facts["http_host"] = names.pop()
    elif names:
        facts["http_host_conflict"] = True
    return Found(facts)


def _path(target: bytes) -> str:
    if absolute := _ABSOLUTE.match(target):
        target = target[absolute.end() :] or b"/"
    return text(target.partition(b"?")[0], _PATH_LIMIT)


def _host(value: bytes) -> str | None:
    match = _HOST.fullmatch(value)
    if match is None:
        return text(value)
    return hostname(match[1].strip(b"[]")) if match[1] else None


PROTOCOL: Final = Protocol(
    "http",
    facts=_FACTS,
    headline="http_host",
    hosts=("http_host",),
    parse=parse,
    changes=_FACTS,
)
