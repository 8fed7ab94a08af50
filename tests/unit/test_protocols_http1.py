"""Requests as clients and as attackers write them."""

from __future__ import annotations

from typing import Any

import pytest

from nfq_agent.protocols import MORE, NO, Found, http1


def facts(data: bytes) -> dict[str, Any]:
    result = http1.parse(data, b"")
    assert isinstance(result, Found)
    assert result.decided
    return result.facts


@pytest.mark.parametrize(
    ("request_", "host"),
    [
        (b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n", "a.test"),
        (b"GET / HTTP/1.1\nhost:a.test\n\n", "a.test"),
        (b"\r\n\r\nGET / HTTP/1.1\r\nHOST:  A.Test.:80 \r\n\r\n", "a.test"),
        (b"GET / HTTP/1.1\r\nHost: [2001:DB8::1]:80\r\n\r\n", "2001:db8::1"),
        (b"GET http://a.test/x HTTP/1.1\r\nHost: a.test\r\n\r\n", "a.test"),
        (b"CONNECT a.test:443 HTTP/1.1\r\nHost: a.test:443\r\n\r\n", "a.test"),
        (b"GET / HTTP/1.1\r\nHost: a.test\r\nHost: A.TEST:80\r\n\r\n", "a.test"),
        (b"GET / HTTP/1.1\r\nX-Host: b.test\r\nHost: a.test\r\n\r\nHost: c.test\r\n\r\n", "a.test"),
    ],
)
def test_the_host(request_: bytes, host: str) -> None:
    assert facts(request_)["http_host"] == host


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.1\r\nHost: a.test\r\nHost: b.test\r\n\r\n",
        b"GET http://a.test/ HTTP/1.1\r\nHost: b.test\r\n\r\n",
        b"CONNECT a.test:443 HTTP/1.1\r\nHost: b.test\r\n\r\n",
    ],
)
def test_two_hosts_are_none(request_: bytes) -> None:
    found = facts(request_)
    assert "http_host" not in found
    assert found["http_host_conflict"] is True


def test_no_host_is_no_conflict() -> None:
    found = facts(b"GET / HTTP/1.0\r\n\r\n")
    assert found == {"protocol": "http", "http_version": "1.0", "http_method": "GET", "http_path": "/"}


def test_the_path_has_no_query() -> None:
    assert facts(b"GET /a?token=secret HTTP/1.1\r\n\r\n")["http_path"] == "/a"
    assert facts(b"GET http://a.test/b?token=secret HTTP/1.1\r\n\r\n")["http_path"] == "/b"
    assert facts(b"GET http://a.test HTTP/1.1\r\n\r\n")["http_path"] == "/"
    assert facts(b"OPTIONS * HTTP/1.1\r\n\r\n")["http_path"] == "*"


def test_nothing_is_said_of_the_host_before_the_head_is_complete() -> None:
    result = http1.parse(b"GET / HTTP/1.1\r\nHost: a.test\r\n", b"")
    assert isinstance(result, Found)
    assert not result.decided
    assert "http_host" not in result.facts


@pytest.mark.parametrize(
    "data",
    [b"hello world\r\n", b"hello\r\n", b"get /\r\n", b"GET a b\r\n", b"GET\r\n", b"G@T / HTTP/1.1\r\n", b"\x16\3\1", b"G@T",
     b" \r\n", b"EHLO me.test\r\n", b"USER me\r\n", b"a1 LOGIN me you\r\n", b"PRI * HTTQ/2.1\r\n"],
)  # fmt: skip
def test_what_is_no_request(data: bytes) -> None:
    assert http1.parse(data, b"") is NO


@pytest.mark.parametrize(
    "data", [b"", b"\r\n", b"G", b"GET", b"GET /a", b"GET /a HTTP/1", b"A" * 30, b" GET", b"PRI * HTTP/2.0\r\n\r\nSM"]
)
def test_what_may_become_one(data: bytes) -> None:
    assert http1.parse(data, b"") is MORE


@pytest.mark.parametrize(
    "data",
    [
        # The request line.
        b"GET / HTTP/1.2\r\n", b"GET / HTTP/1.10\r\n", b"GET / HTTP/2.0\r\n", b"GET / HTTP/3.1\r\n", b"GET  / HTTP/1.1\r\n",
        b"GET /  HTTP/1.1\r\n", b"GET / HTTP/1.1 \r\n", b"GET\t/\tHTTP/1.1\r\n", b" GET / HTTP/1.1\r\n", b"GET\xa0/ HTTP/1.1\r\n",
        b"GET / http/1.1\r\n", b"GET /a b\r\n", b"GET a\r\n", b"GET /\xa0HTTP/1.1\r\n",
        b"GET http:///x HTTP/1.1\r\n\r\n", b"GET x HTTP/1.1\r\n\r\n",
        # Hosts that are none.
        b"GET / HTTP/1.1\r\nHost: b.test:80a\r\n\r\n", b"GET / HTTP/1.1\r\nHost: b.test:x.a.test\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: b.test:80@x.a.test\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a..test\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: .a.test\r\n\r\n", b"GET http://u@a.test/ HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\xff.test\r\n\r\n", b"CONNECT a.test:b HTTP/1.1\r\n\r\n",
        # Fields.
        b"GET / HTTP/1.1\r\nHost:\r\n a.test\r\n\r\n", b"GET / HTTP/1.1\r\nHost : a.test\r\n\r\n", b"GET / HTTP/1.1\r\nx\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\0.test\r\n\r\n", b"GET / HTTP/1.1\r\nX: a\rHost: b.test\r\n\r\n",
        b"GET / HTTP/1.1\r\n X: 1\r\n\r\n",
        # How long the body is.
        b"POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: +5\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: \r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: x, chunked\r\n\r\n", b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)  # fmt: skip
def test_what_servers_read_in_different_ways(data: bytes) -> None:
    found = facts(data)
    assert found["protocol"] == "http"
    assert found["conflict"]
    assert "http_host" not in found


def test_the_simple_request_of_http_0_9() -> None:
    assert facts(b"GET http://a.test/x\r\n")["http_host"] == "a.test"
    assert facts(b"GET /x?y\r\n") == {"protocol": "http", "http_version": "0.9", "http_method": "GET", "http_path": "/x"}


def test_an_absolute_target_without_a_path() -> None:
    assert facts(b"GET http://a?b HTTP/1.1\r\n\r\n")["http_path"] == "/"


def used(data: bytes) -> tuple[int, int, object]:
    result = http1.parse(data)
    assert isinstance(result, Found)
    return result.used, result.skip, result.then


def test_where_a_request_ends() -> None:
    head = b"\r\nPOST / HTTP/1.1\r\nHost: a\r\nContent-Length: 12\r\n\r\n"
    end, skip, then = used(head + b"body")
    assert (end, skip) == (len(head), 0)
    assert callable(then)
    result = then(b"body", b"")
    assert isinstance(result, Found)
    assert (result.used + result.skip, result.then) == (12, http1.parse)
    assert used(b"GET / HTTP/1.0\n\nrest") == (16, 0, http1.parse)


def test_chunks_are_followed_to_their_end() -> None:
    head = b"POST / HTTP/1.1\r\nTransfer-Encoding: Chunked\r\n\r\n"
    rest = b"5;a=b\r\nhello\r\nA\r\n0123456789\r\n0\r\nX: 1\r\n\r\nGET /next HTTP/1.1\r\n\r\n"
    at, skip, then = used(head + rest)
    data = (head + rest)[at + skip :]
    while then is not http1.parse:
        assert callable(then)
        result = then(data, b"")
        assert isinstance(result, Found)
        assert not result.facts
        data, then = data[result.used + result.skip :], result.then
    assert data.startswith(b"GET /next")


@pytest.mark.parametrize("chunk", [b"0x5\r\n", b"5\nhello", b" 5\r\n", b"\r\n", b"g\r\n", b"-1\r\n"])
def test_chunks_that_servers_read_in_different_ways(chunk: bytes) -> None:
    result = http1.parse(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
    assert isinstance(result, Found)
    assert result.then is not None
    wrong = result.then(chunk, b"")
    assert isinstance(wrong, Found)
    assert wrong.facts["conflict"]


def test_http_2_in_clear_text_is_a_conflict() -> None:
    """Its hosts are compressed over the whole connection; a block-list must not be evaded by it."""
    found = http1.parse(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
    assert isinstance(found, Found)
    assert (found.facts["protocol"], found.facts["http_version"]) == ("http", "2")
    assert found.facts["conflict"]
