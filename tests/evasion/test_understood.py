"""What a server understood is what we judged: requests as hypothesis twists them, against real servers.

The policy decides packet by packet, without a kernel, which bytes arrive; a real server is given exactly those. It must never
answer for a denied name. Of requests in the plain form for allowed names alone every byte arrives.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from agent import until
from captures import listening
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from namespace import Namespace

from nfq_agent.testing import Bench, tcp
from nfq_agent.verdict import Action

pytestmark = pytest.mark.kernel

ALLOWED, DENIED = "a.allowed.test", "b.refused.test"
CLIENT, SERVER = "192.0.2.1:40000", "198.51.100.1:80"
NGINX, PYTHON = 8000, 8080

_NGINX = """
daemon off; master_process off; user root; pid /run/nginx.pid; error_log /dev/null;
events { worker_connections 64; }
http { access_log off; client_body_temp_path /run/nginx-body; keepalive_timeout 1s; client_header_timeout 1s;
  server { listen 127.0.0.1:8000; location / { return 200 "<<$host>>\\n"; } } }
"""
_PYTHON = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 1
    def do_GET(self):
        try:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
        except ValueError:
            pass
        body = ("<<" + str(self.headers.get("Host")) + ">>").encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    do_POST = do_HEAD = do_GET
http.server.ThreadingHTTPServer(("127.0.0.1", 8080), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Namespace]:
    """The servers on the loopback of a namespace; this process's sockets are made in there."""
    folder: Path = tmp_path_factory.mktemp("understood")
    (folder / "nginx.conf").write_text(_NGINX)
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with Namespace() as namespace:
        namespace.start("nginx", "-c", str(folder / "nginx.conf"), **quiet)
        namespace.start(sys.executable, "-c", _PYTHON, **quiet)
        for port in (NGINX, PYTHON):
            until(partial(listening, namespace, port), f"port {port} is served")
        yield namespace


def hosts(port: int, data: bytes, ended: bool) -> list[str]:
    """The names for which the server answered. ended: it sees the end of the stream too."""
    with socket.create_connection(("127.0.0.1", port), timeout=60 if ended else 0.1) as connection:
        got = b""
        try:
            connection.sendall(data)
            if ended:
                connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                got += part
        except OSError:
            pass
    return [
        name.decode("latin-1").partition(":")[0].strip().lower().rstrip(".") for name in re.findall(rb"<<(.*?)>>", got, re.DOTALL)
    ]


def arrives(segments: list[bytes], kind: str) -> tuple[bytes, bool]:
    """What of the segments passes a policy, and whether the end of the stream does.

    A packet that is dropped comes again and is dropped again, so it ends there.
    """
    allow = kind == "allow-list"
    rule = [{"action": "accept" if allow else "drop", "http_host": "*.allowed.test" if allow else "*.refused.test"}]
    bench = Bench("policy", before=[("dpi", {})], default="drop" if allow else "accept", rule=rule)
    bench.decide(tcp(CLIENT, SERVER, flags="S", seq=0))
    at, passed = 1, b""
    for segment in segments:
        if bench.decide(tcp(CLIENT, SERVER, segment, seq=at)).action is not Action.ACCEPT:
            return passed, False
        at += len(segment)
        passed += segment
    return passed, bench.decide(tcp(CLIENT, SERVER, seq=at, flags="FA")).action is Action.ACCEPT


NAMES = st.sampled_from(
    [ALLOWED, DENIED, DENIED.upper(), f"{DENIED}.", f"{DENIED}:80", f"{DENIED}:80a", f"{ALLOWED}@{DENIED}", f"{DENIED}:{ALLOWED}"]
)
SPACE = st.sampled_from([" "] * 8 + ["  ", "\t", "\xa0", "\x0b", ""])
END = st.sampled_from(["\r\n"] * 8 + ["\n", "\r", "\r\n ", "\n\t", "\r\r\n"])
METHOD = st.sampled_from(["GET"] * 6 + ["POST", "HEAD", "get", "X" * 30, " GET", "\r\nGET", "GET\0"])
TARGET = st.sampled_from(["/"] * 6 + ["*", "", "x", "/a b", "//x"]) | st.builds(
    "http://{}{}".format, NAMES, st.sampled_from(["", "/", "?x", "#/"])
)
VERSION = st.sampled_from(
    ["HTTP/1.1"] * 8 + ["HTTP/1.0", "HTTP/1.2", "HTTP/1.10", "HTTP/2.0", "HTTP/01.1", "http/1.1", "HTTP/0.9", "", "HTTP/1.1 "]
)
BODY = st.sampled_from(["", "hello", f"GET / HTTP/1.1\r\nHost: {DENIED}\r\n\r\n", "5\r\nhello\r\n0\r\n\r\n", "0\r\n\r\n"])


@st.composite
def fields(draw: st.DrawFn) -> tuple[str, str]:
    """Header lines, and a body that fits them, or does not."""
    lines = draw(
        st.lists(
            st.sampled_from(
                ["X: 1", "x", "X : 1", " X: 1", "X:\x00", "Content-Length: 5", "Content-Length: +5", "Connection: close"]
            ),
            max_size=2,
        )
    )
    for name in draw(st.lists(NAMES, min_size=1, max_size=2)):
        key = draw(
            st.sampled_from(["Host: "] * 6 + ["hOsT:", "Host :", "Host:\t", " Host: ", "Host:\r\n ", "Host:\n\t", "X-Host: "])
        )
        lines.insert(draw(st.integers(0, len(lines))), key + name + draw(st.sampled_from(["", " "])))
    body = draw(BODY)
    framing = draw(st.sampled_from(["length", "length", "chunked", "both", "none"])) if body else "none"
    if framing in ("length", "both"):
        lines.append(f"Content-Length: {len(body)}")
    if framing in ("chunked", "both"):
        lines.append("Transfer-Encoding: " + draw(st.sampled_from(["chunked", "Chunked", "x, chunked", "chunked "])))
    end = draw(END)
    return "".join(line + (end if draw(st.booleans()) else "\r\n") for line in lines), body


@st.composite
def conversations(draw: st.DrawFn) -> list[bytes]:
    """One to three requests, twisted a little, in segments."""
    data = ""
    for _ in range(draw(st.integers(1, 3))):
        head, body = draw(fields())
        data += draw(METHOD) + draw(SPACE) + draw(TARGET) + draw(SPACE) + draw(VERSION) + draw(END) + head + draw(END) + body
    whole = bytearray(data.encode("latin-1"))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(whole) - 1))
        whole[at : at + draw(st.integers(0, 2))] = draw(
            st.sampled_from([b"", b"\n", b"\r", b" ", b"\t", b"\0", b":", b"\x85", b"0"])
        )
    cuts = sorted({0, len(whole), *draw(st.lists(st.integers(0, len(whole)), max_size=4))})
    return [bytes(whole[start:end]) for start, end in pairwise(cuts)]


def plain(host: str, body: str = "") -> bytes:
    return f"POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


def test_the_servers_say_what_they_understood(inside: Namespace) -> None:
    for port in (NGINX, PYTHON):
        assert inside.call(hosts, port, plain(ALLOWED, "hello") + plain(DENIED), True) == [ALLOWED, DENIED]


# As many on each run, and the same; EXAMPLES=5000 looks for more.
EXAMPLES = int(os.environ.get("EXAMPLES", "200"))


@settings(max_examples=EXAMPLES, derandomize=EXAMPLES == 200, deadline=None, suppress_health_check=list(HealthCheck))
@given(conversations())
@example([plain(ALLOWED) + plain(DENIED)])
@example([f"GET / HTTP/1.1\r\nHost: {DENIED}\r\n\r".encode()])
@example([f"GET * \r\nHost: {DENIED}\r\n\r\n".encode()])
@example([f"GET /HTTP/1.1\r\nHost: {DENIED}\r\n\r\n".encode()])
@example([f"GET /\xa0HTTP/1.1\r\nHost: {DENIED}\r\n\r\n".encode("latin-1")])
@example([plain(ALLOWED, "x" * 50)[:-20], b"x" * 20 + plain(DENIED)])
@pytest.mark.parametrize("kind", ["allow-list", "block-list"])
def test_no_server_answers_for_a_denied_name(inside: Namespace, kind: str, segments: list[bytes]) -> None:
    passed, ended = arrives(segments, kind)
    for port, server in ((NGINX, "nginx"), (PYTHON, "Python")):
        understood = inside.call(hosts, port, passed, ended) if passed else []
        assert DENIED not in understood, f"{server} answered for {understood} to {passed!r}"


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["", "hello", "x" * 3000]), st.booleans()), min_size=1, max_size=4),
    st.lists(st.integers(0, 4000), max_size=5),
)
@pytest.mark.parametrize("kind", ["allow-list", "block-list"])
def test_allowed_names_arrive_whole(kind: str, requests: list[tuple[str, bool]], cuts: list[int]) -> None:
    data = b"".join(
        f"POST / HTTP/1.1\r\nHost: {ALLOWED}\r\nTransfer-Encoding: chunked\r\n\r\n{len(body):x}\r\n{body}\r\n0\r\n\r\n".encode()
        if chunked and body
        else plain(ALLOWED, body)
        for body, chunked in requests
    )
    places = sorted({0, len(data), *(cut % len(data) for cut in cuts)})
    assert arrives([data[start:end] for start, end in pairwise(places)], kind) == (data, True)
