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
        (b"GET / HTTP/1.1\r\nHost : a.test\r\n\r\n", "a.test"),
        (b"GET / HTTP/1.1\r\nHost: [2001:DB8::1]:80\r\n\r\n", "2001:db8::1"),
        (b"GET http://a.test/x HTTP/1.1\r\nHost: a.test\r\n\r\n", "a.test"),
        (b"GET http://user@a.test:80/x HTTP/1.1\r\n\r\n", "a.test"),
        (b"CONNECT a.test:443 HTTP/1.1\r\nHost: a.test:443\r\n\r\n", "a.test"),
        (b"GET / HTTP/1.1\r\nHost: a.test\r\nHost: A.TEST:80\r\n\r\n", "a.test"),
        (b"GET / HTTP/1.1\r\nX-Host: b.test\r\nHost: a.test\r\n\r\nHost: c.test\r\n\r\n", "a.test"),
        (b"GET / HTTP/1.1\r\nHost: a\0.test\r\n\r\n", "a\\x00.test"),
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
    [b"hello world\r\n", b"GET /\r\n", b"GET / HTTP/2.0\r\n", b"GET  / HTTP/1.1\r\n", b"G@T / HTTP/1.1\r\n", b"\x16\3\1",
     b"A" * 25, b"EHLO me.test\r\n", b"GET / HTTP/1.1 \r\n", b"PRI * HTTP/2.1\r\n"],
)  # fmt: skip
def test_what_is_no_request(data: bytes) -> None:
    assert http1.parse(data, b"") is NO


@pytest.mark.parametrize("data", [b"", b"\r\n", b"G", b"GET", b"GET /a", b"GET /a HTTP/1", b"PRI * HTTP/2.0\r\n\r\nSM"])
def test_what_may_become_one(data: bytes) -> None:
    assert http1.parse(data, b"") is MORE
