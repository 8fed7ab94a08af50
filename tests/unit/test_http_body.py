"""Bodies of HTTP requests: passed over, unless a server that does not read them would take them for a request."""

from __future__ import annotations

import pytest

from nfq_agent.protocols.http_body import is_request_line
from nfq_agent.testing import Bench, tcp

CLIENT, SERVER = "192.0.2.1:40000", "198.51.100.1:80"
DENIED = b"GET / HTTP/1.1\r\nHost: x.denied.test\r\n\r\n"
ALLOWED = b"GET / HTTP/1.1\r\nHost: a.allowed.test\r\n\r\n"
KINDS = pytest.mark.parametrize("kind", ["allow-list", "block-list"])


def fates(kind: str, segments: list[bytes]) -> list[str]:
    """The verdict on each segment of the client."""
    allow = kind == "allow-list"
    rule = [{"action": "accept" if allow else "drop", "http_host": "*.allowed.test" if allow else ["*.denied.test"]}]
    bench = Bench("policy", before=[("dpi", {})], default="drop" if allow else "accept", rule=rule, undecided="accept")
    bench.decide(tcp(CLIENT, SERVER, flags="S", seq=0))
    found, at = [], 1
    for segment in segments:
        found.append(bench.decide(tcp(CLIENT, SERVER, segment, seq=at)).action.name)
        at += len(segment)
    return found


def head(length: int, method: bytes = b"POST") -> bytes:
    return method + b" / HTTP/1.1\r\nHost: a.allowed.test\r\nContent-Length: %d\r\n\r\n" % length


def request(body: bytes, method: bytes = b"POST") -> bytes:
    return head(len(body), method) + body


SMUGGLED = {
    "whole": [request(DENIED)],
    "in the next segment": [head(len(DENIED)), DENIED],
    "behind an allowed request in the body": [request(ALLOWED + DENIED)],
    "with a body of its own": [request(b"POST / HTTP/1.1\r\nHost: a.allowed.test\r\nContent-Length: 5\r\n\r\nhello")],
    "byte by byte": [head(len(DENIED)), *[bytes((each,)) for each in DENIED]],
    "behind empty lines": [request(b"\r\n\n" + DENIED)],
    "continued behind the method": [request(b"GET "), DENIED[4:]],
    "continued within the method": [request(b"G") + DENIED[1:]],
    "continued behind the line": [request(DENIED[:14]) + DENIED[14:]],
    "an allowed request in a field of it": [request(b"GET / HTTP/1.1\r\nHost: x.denied.test\r\nX: ") + ALLOWED],
    "a target that the next line continues": [request(b"GET http://x.denied.test/ ") + ALLOWED],
    "another method": [request(b"PURGE / HTTP/1.1\r\nHost: x.denied.test\r\n\r\n")],
    "four words": [request(b"GET / and HTTP/1.1\r\nHost: x.denied.test\r\n\r\n")],
    "two words": [request(b"GET /\nHost: x.denied.test\n\n")],
    "tabs": [request(DENIED.replace(b" ", b"\t", 2))],
    "as the size of a chunk": [
        b"POST / HTTP/1.1\r\nHost: a.allowed.test\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"ADD ;x HTTP/1.1\r\nHost: x.denied.test\r\n\r\n"
    ],
}


@KINDS
@pytest.mark.parametrize("segments", SMUGGLED.values(), ids=SMUGGLED)
def test_a_body_that_a_server_may_take_for_a_request_is_not_passed(kind: str, segments: list[bytes]) -> None:
    assert fates(kind, segments)[-1] == "DROP"


HONEST = {
    "JSON": [request(b'{"get": 1}', b"GET"), ALLOWED],
    "capital letters": [request(b"OK"), request(b"P"), request(b"PUT"), request(b"ABCDEF"), ALLOWED],
    "a statement": [request(b"INSERT INTO t VALUES (1)"), request(b"SELECT 1"), ALLOWED],
    "a long line": [head(100_000), *[b"SELECT " + bytes(993)] * 100, ALLOWED],
    "an allowed request": [
        request(ALLOWED), request(ALLOWED * 3 + b"behind"), head(len(ALLOWED)),
        ALLOWED[:20], ALLOWED[20:], ALLOWED,
    ],
    "lines": [request(b"GET the milk\nPUT it down\n"), ALLOWED],
    "no bytes": [request(b""), ALLOWED],
    "empty lines": [request(b"\r\n\r\n"), ALLOWED],
    "sixty chunks whose sizes are split": [
        b"POST / HTTP/1.1\r\nHost: a.allowed.test\r\nTransfer-Encoding: chunked\r\n\r\n5",
        *[b"\r\nhello\r\n5"] * 60, b"\r\nhello\r", b"\n0\r\nX: 1\r\n", b"\r\n", ALLOWED,
    ],
}  # fmt: skip


@KINDS
@pytest.mark.parametrize("segments", HONEST.values(), ids=HONEST)
def test_an_honest_body_passes_and_the_next_request_is_read(kind: str, segments: list[bytes]) -> None:
    assert set(fates(kind, segments)) == {"ACCEPT"}
    assert fates(kind, [*segments, DENIED])[-1] == "DROP"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", None),
        (b"\r\n", None),
        (b"G", None),
        (b"GE", None),
        (b"g", False),
        (b"GET", None),
        (b"GET ", None),
        (b"GET /", None),
        (b"GET / x", None),
        (b"GET / x\n", False),
        (b"GET /\n", True),
        (b"PUT /\n", False),
        (b"FOO / H", None),
        (b"FOO / x", False),
        (b"FOO / HTTP/9\n", True),
        (b"FO / HTTP/1.1\n", False),
        (b"{", False),
        (b" \xa0", None),
    ],
)
def test_the_beginning_of_a_request_line(data: bytes, expected: bool | None) -> None:
    assert is_request_line(data) is expected
