"""HTTP/1: request line, header fields and how long the body is (RFC 9112), and the preface of HTTP/2 in clear text.

Servers take more than the RFC's form, and not all of them the same. The plain form is read. What only some servers answer, or
what they read in different ways, is a conflict and has no host. NO is the answer for bytes that no server answers: nginx, Apache,
Node, HAProxy, Go and Python were compared.

Steps: one pass of each of two regular expressions without backtracking over the head, and one for each field that matters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, Final

from nfq_agent.protocols import MORE, NO, WAIT, Found, Parser, Protocol, Result, host_name, starttls, text
from nfq_agent.protocols.http_body import body, is_request_line

_TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
# RFC 9112 3: method SP request-target SP HTTP-version; a line may end with LF alone (2.2).
_LINE: Final = re.compile(rb"(" + _TOKEN + rb"+) ([\x21-\x7e\x80-\xff]+) HTTP/1\.([01])\r?\n")
_WORD: Final = re.compile(_TOKEN + rb"+")
# What Python's server splits a request line at; the others know space and tab.
_GAPS: Final = bytes.maketrans(b"\t\x0b\x0c\r\x1c\x1d\x1e\x1f\x85\xa0", b" " * 10)
_SIMPLE: Final = re.compile(rb"GET (/[\x21-\x7e]*|[A-Za-z][A-Za-z0-9+.\-]*://[\x21-\x7e]*)\r?\n")
_END: Final = re.compile(rb"\n\r?\n")
# Fields without folding, spaces before the colon or control characters.
_FIELDS: Final = re.compile(rb"(?:" + _TOKEN + rb"+:[^\x00-\x08\x0a-\x1f\x7f]*\r?\n)*")
_READ: Final = re.compile(
    rb"\n(host|content-length|transfer-encoding|user-agent|upgrade):[ \t]*([^\r\n]*)", re.IGNORECASE
)  # fmt: skip
_AUTHORITY: Final = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[^:@\[\]]+)(?::[0-9]*)?")
_ABSOLUTE: Final = re.compile(rb"[A-Za-z][A-Za-z0-9+.\-]*://([^/?#]*)")
_LENGTH: Final = re.compile(rb"[0-9]{1,15}")
_CHUNK: Final = re.compile(rb"([0-9A-Fa-f]{1,12})(?:[ \t]*;[^\x00-\x08\x0a-\x1f\x7f]*)?\r\n")
_HTTP2: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_PATH_LIMIT: Final = 1024
_CHUNK_LINE_LIMIT: Final = 1024
_FACTS: Final = (
    "http_host", "http_host_conflict", "http_method", "http_path", "http_user_agent", "http_version",
)  # fmt: skip
# What a request says besides its host.
BESIDE_HOST: Final = frozenset(_FACTS) - {"http_host"}


def parse(client: bytes, server: bytes = b"") -> Result:
    """One request. http_path is the target without its query, http_host has neither port nor capital letters.

    Two hosts that differ (two Host fields, or a target that names another) give no name: http_host_conflict reports it.
    """
    # A server ignores empty lines before the request (RFC 9112 2.2).
    data = client.lstrip(b"\r\n") if client[:1] in (b"\r", b"\n") else client
    if not data:
        return MORE
    line = _LINE.match(data)
    if line is None:
        return _unusual(client, data)
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
    # From the line feed of the request line to that of the last field.
    fields = data[line.end() - 1 : end.start() + 1]
    if _FIELDS.fullmatch(fields, 1) is None:
        return _conflict("a header field that servers read in different ways")
    hosts: list[bytes] = []
    lengths: list[bytes] = []
    codings: list[bytes] = []
    upgrade = method == b"CONNECT"
    for name, value in _READ.findall(fields):
        # The first letter tells them apart, in either case; the second too, for two of them.
        kind = name[0] | 0x20
        if kind == 0x68:
            hosts.append(value)
        elif kind == 0x63:
            lengths.append(value.rstrip(b" \t"))
        elif kind == 0x74:
            codings.append(value.rstrip(b" \t"))
        elif name[1] | 0x20 == 0x70:
            upgrade = True
        else:
            facts.setdefault("http_user_agent", text(value.rstrip(b" \t")))
    if wrong := _add_host(facts, method, target, hosts):
        return wrong
    return _framed(facts, len(client) - len(data) + end.end(), minor, lengths, codings, upgrade)


def _add_host(facts: dict[str, Any], method: bytes, target: bytes, hosts: list[bytes]) -> Found | None:
    """Put the one host into the facts; a conflict where there are several, or one that is not a host name."""
    if len(hosts) == 1 and target[:1] == b"/" and method != b"CONNECT" and (name := _authority(hosts[0])):
        facts["http_host"] = name
        return None
    if method == b"CONNECT":
        hosts = [target, *hosts]
    elif absolute := _ABSOLUTE.match(target):
        hosts = [absolute[1], *hosts]
        if not absolute[1]:
            return _conflict("a target without a host")
    elif target[:1] != b"/" and target != b"*":
        return _conflict("a target that is not a path")
    names: set[str] = set()
    for value in hosts:
        name = _authority(value)
        if name is None:
            return _conflict("a host that is not a host name")
        if name:
            names.add(name)
    if len(names) > 1:
        return _conflict("two hosts", http_host_conflict=True)
    if names:
        facts["http_host"] = names.pop()
    return None


@lru_cache(1024)
def _authority(value: bytes) -> str | None:
    """The host of a field or a target; empty where there is none, None if it is not a host name or a port."""
    value = value.rstrip(b" \t")
    if not value:
        return ""
    authority = _AUTHORITY.fullmatch(value)
    if authority is None:
        return None
    return authority[1][1:-1].decode().lower() if authority[1][:1] == b"[" else host_name(authority[1])


def _framed(facts: dict[str, Any], used: int, minor: bytes, lengths: list[bytes], codings: list[bytes], upgrade: bool) -> Found:
    """The request with what follows it: nothing, a body of a known length, or chunks (RFC 9112 6)."""
    then = partial(_tunnel, facts) if upgrade else parse
    if not lengths and not codings:
        return Found(facts, used=used, then=then)
    if codings:
        # A length in both forms, twice, or in HTTP/1.0 can smuggle requests (RFC 9112 11.2).
        if len(codings) > 1 or lengths or codings[0].lower() != b"chunked" or minor == b"0":
            return _conflict("a body whose length servers read in different ways")
        return Found(facts, used=used, then=_tunnel_behind_chunks if upgrade else _chunk)
    if len(lengths) > 1 or _LENGTH.fullmatch(lengths[0]) is None:
        return _conflict("a body whose length servers read in different ways")
    length = int(lengths[0])
    return Found(facts, used=used, then=body(length, then, parse) if length else then)


def _conflict(reason: str, **facts: Any) -> Found:
    return Found({"protocol": "http", "conflict": reason, **facts})


def _unusual(client: bytes, data: bytes) -> Result:
    """What is not in the plain form: HTTP/2, HTTP/0.9, a line that only some servers answer, or no HTTP at all."""
    if _HTTP2.startswith(data[: len(_HTTP2)]):
        complete = len(data) >= len(_HTTP2)
        return _conflict("HTTP/2 in clear text, which hides its hosts", http_version="2") if complete else MORE
    if simple := _SIMPLE.match(data):
        facts = {"protocol": "http", "http_version": "0.9", "http_method": "GET", "http_path": _path(simple[1])}
        wrong = _add_host(facts, b"GET", simple[1], [])
        return wrong or Found(facts, used=len(client) - len(data) + simple.end(), then=_after_simple)
    end = data.find(b"\n")
    words = (data if end < 0 else data[:end]).translate(_GAPS).split(b" ")
    words = [word for word in words if word]
    if words and _WORD.fullmatch(words[0]) is None:
        return NO
    if end < 0:
        return MORE
    if len(words) < 2:
        return NO
    # Python's server answers a GET of two words, whatever the second is, and reads header fields behind it.
    simple_request = words[0] == b"GET" and (len(words) == 2 or words[1][:1] == b"/" or b"://" in words[1])
    if simple_request or any(b"HTTP/" in word.upper() for word in words[1:]):
        return _conflict("a request line that only some servers read")
    return NO


def _after_simple(client: bytes, server: bytes = b"") -> Result:
    """HTTP/0.9 has nothing behind its line; Python's server reads header fields there anyway."""
    return _conflict("bytes behind a request of HTTP/0.9")


def _tunnel(asked: Mapping[str, Any], client: bytes, server: bytes = b"") -> Result:
    """What follows CONNECT or an upgrade: a request, where the server did not agree, or bytes of another protocol.

    asked: the facts of the request.
    """
    result = parse(client)
    return _within(asked, starttls.lookout({"protocol": "http"}, client, carries=False), client) if result is NO else result


def _within(asked: Mapping[str, Any], read: Parser, client: bytes, server: bytes = b"") -> Result:
    """A ClientHello in a tunnel. The request keeps its host, unless the hello names another one: each is judged by itself."""
    result = read(client, b"")
    if not isinstance(result, Found):
        return result
    facts = result.facts
    if "conflict" not in facts and "tls_version" in facts:
        host = asked.get("http_host", "")
        is_address = ":" in host or host.rpartition(".")[2].isdigit()
        if is_address or facts.get("tls_sni", host) == host:
            facts = {**asked, **facts}
        else:
            facts = {**facts, "conflict": "a tunnel to one host, and a ClientHello for another"}
    return replace(result, facts=facts, then=result.then and partial(_within, asked, result.then))


def _chunk(client: bytes, server: bytes = b"") -> Result:
    """The size of a chunk (RFC 9112 7.1)."""
    line = _CHUNK.match(client)
    if line is None:
        return WAIT if b"\n" not in client and len(client) < _CHUNK_LINE_LIMIT else _conflict("not a valid chunk")
    if is_request_line(line[0]):
        return _conflict("a chunk that begins like a request")
    size = int(line[1], 16)
    if size:
        return Found({}, used=line.end(), skip=size, then=_chunk_end)
    return Found({}, used=line.end(), then=_trailers)


def _chunk_end(client: bytes, server: bytes = b"") -> Result:
    """The line end behind a chunk."""
    if len(client) < 2:
        return WAIT if b"\r\n".startswith(client) else _conflict("not a valid chunk")
    return Found({}, used=2, then=_chunk) if client.startswith(b"\r\n") else _conflict("not a valid chunk")


def _trailers(client: bytes, server: bytes = b"") -> Result:
    """The fields behind the last chunk, and the empty line."""
    if client.startswith(b"\r\n"):
        return Found({}, used=2, then=parse)
    end = _END.search(client)
    if end is None:
        return WAIT
    if _FIELDS.fullmatch(client, 0, end.start() + 1) is None:
        return _conflict("a trailer that servers read in different ways")
    return Found({}, used=end.end(), then=parse)


def _tunnel_behind_chunks(client: bytes, server: bytes = b"") -> Result:
    """An upgrade that has a body of chunks: what comes behind them cannot be told for certain."""
    return _conflict("an upgrade with a body in chunks")


def _path(target: bytes) -> str:
    if absolute := _ABSOLUTE.match(target):
        target = target[absolute.end() :]
    return text(target.partition(b"?")[0] or b"/", _PATH_LIMIT)


PROTOCOL: Final = Protocol(
    "http",
    facts=_FACTS,
    headline="http_host",
    hosts=("http_host",),
    parse=parse,
    changes=_FACTS,
)
