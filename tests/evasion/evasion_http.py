"""Evasions over HTTP, against nginx and Python's server."""

from __future__ import annotations

import socket
import time
from functools import partial

from evasion_attempt import Attempt
from evasion_config import NGINX, NGINX_2
from evasion_line import Line
from evasion_servers import PLAIN, PYTHON


def _get(host: str, *, path: str = "/", extra: str = "") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{extra}\r\n".encode()


def alone(template: str, attempt: Attempt, name: str, *, port: int = NGINX) -> None:
    """One request on a connection of its own. N stands for the name, A for an allowed one."""
    attempt.say(port, _filled(template, attempt, name))


def after(template: str, attempt: Attempt, name: str, *, port: int = NGINX) -> None:
    """The same, behind an allowed request on one connection."""
    with attempt.tcp(port) as connection:
        connection.sendall(_get(attempt.allowed, path="/first"))
        attempt.drain(connection, 0.3)
        connection.sendall(_filled(template, attempt, name))
        attempt.drain(connection)


def _filled(template: str, attempt: Attempt, name: str) -> bytes:
    return template.replace("<N>", name).replace("<A>", attempt.allowed).encode("latin-1")


# What servers take beside the plain form; each is tried alone and behind an allowed request.
SPELLINGS = {
    "version-1.2": ("`HTTP/1.2` in the request line", "GET / HTTP/1.2\r\nHost: <N>\r\n\r\n", NGINX),
    "version-1.10": ("`HTTP/1.10` in the request line", "GET / HTTP/1.10\r\nHost: <N>\r\n\r\n", NGINX),
    "two-spaces": ("two spaces behind the method", "GET  / HTTP/1.1\r\nHost: <N>\r\n\r\n", NGINX),
    "spaces-before-version": ("several spaces before the version", "GET /   HTTP/1.1\r\nHost: <N>\r\n\r\n", NGINX),
    "space-after-version": ("a space behind the version", "GET / HTTP/1.1 \r\nHost: <N>\r\n\r\n", NGINX),
    "tab-in-line": ("tabs between the parts of the request line", "GET\t/\tHTTP/1.1\r\nHost: <N>\r\n\r\n", PYTHON),
    "space-first": ("a space before the method", " GET / HTTP/1.1\r\nHost: <N>\r\n\r\n", PYTHON),
    "nbsp-in-line": ("a no-break space (0xa0) between the parts", "GET\xa0/\xa0HTTP/1.1\r\nHost: <N>\r\n\r\n", PYTHON),
    "absolute-without-version": ("an absolute URI without a version", "GET http://<N>/\r\n", NGINX),
    "absolute": ("an absolute URI beside another Host", "GET http://<N>/ HTTP/1.1\r\nHost: <A>\r\n\r\n", NGINX),
    "fields-behind-0.9": ("header fields behind a request line of HTTP/0.9", "GET /HTTP/1.1\r\nHost: <N>\r\n\r\n", PYTHON),
    "long-method": ("a method of 30 letters", "A" * 30 + " / HTTP/1.1\r\nHost: <N>\r\n\r\n", NGINX),
    "folded-host": ("a folded Host field", "GET / HTTP/1.1\r\nHost:\r\n <N>\r\n\r\n", PYTHON),
    "folded-host-tab": ("a Host field folded with a tab", "GET / HTTP/1.1\r\nHost:\r\n\t<N>\r\n\r\n", PYTHON),
    "port-that-is-none": ("letters in the port of Host", "GET / HTTP/1.1\r\nHost: <N>:80a\r\n\r\n", NGINX),
    "host-with-a-name-as-port": ("an allowed name as the port", "GET / HTTP/1.1\r\nHost: <N>:x.allowed.test\r\n\r\n", NGINX),
    "host-with-userinfo": ("an allowed name behind `:80@`", "GET / HTTP/1.1\r\nHost: <N>:80@x.allowed.test\r\n\r\n", NGINX),
    "two-hosts": ("a Host field of another name behind it", "GET / HTTP/1.1\r\nHost: <N>\r\nHost: <A>\r\n\r\n", PYTHON),
    "host-capitals-and-dot": ("capital letters, and a dot at the end", "GET / HTTP/1.1\r\nhOST: <N>.\r\n\r\n", NGINX),
    "bare-lf": ("lines that end with LF alone", "GET / HTTP/1.1\nHost: <N>\n\n", NGINX),
    "empty-lines-first": ("empty lines before the request", "\r\n\r\nGET / HTTP/1.1\r\nHost: <N>\r\n\r\n", NGINX),
    "line-without-colon": ("a line without a colon before Host", "GET / HTTP/1.1\r\nX\r\nHost: <N>\r\n\r\n", NGINX),
    "absolute-query": ("an absolute URI without a path", "GET http://<N>?b HTTP/1.1\r\nHost: <A>\r\n\r\n", NGINX),
    "bare-cr": ("a bare CR before the Host field", "GET / HTTP/1.1\r\nX: a\rHost: <N>\r\n\r\n", PYTHON),
    "line-of-a-colon": ("a field without a name before Host", "GET / HTTP/1.1\r\n: x\r\nHost: <N>\r\n\r\n", PYTHON),
    "host-with-hash": ("an allowed name behind `#` in Host", "GET / HTTP/1.1\r\nHost: <N>#x.allowed.test\r\n\r\n", NGINX),
    "length-with-sign": (
        "behind a body of `Content-Length: +4`",
        "POST / HTTP/1.1\r\nHost: <A>\r\nContent-Length: +4\r\n\r\nbodyGET / HTTP/1.1\r\nHost: <N>\r\n\r\n", PYTHON,
    ),
    "header-name-that-is-none": ("a field name that is none before Host", "GET / HTTP/1.1\r\nX(): 1\r\nHost: <N>\r\n\r\n", NGINX),
}  # fmt: skip

# What some other server takes.
MORE_SPELLINGS = {
    "version-2.0": ("`HTTP/2.0` in the request line", "GET / HTTP/2.0\r\nHost: <N>\r\n\r\n"),
    "version-3.1": ("`HTTP/3.1` in the request line", "GET / HTTP/3.1\r\nHost: <N>\r\n\r\n"),
}


def _two(first: str, attempt: Attempt, name: str, *, port: int = NGINX, last: str = "") -> None:
    """Several requests in one segment; the second asks for the name."""
    attempt.say(port, _filled(first, attempt, name) + _get(name, path="/second") + _filled(last, attempt, name))


def _version_2(attempt: Attempt, name: str) -> None:
    """The preface, SETTINGS, and one HEADERS frame: GET, http, /, and the name as it is (RFC 9113 3.4, RFC 7541 6.2.2)."""
    block = b"\x82\x86\x84\x01" + bytes((len(name),)) + name.encode()
    headers = len(block).to_bytes(3, "big") + b"\1\5\0\0\0\1" + block
    attempt.say(NGINX_2, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0" + headers)


def _slow(attempt: Attempt, name: str) -> None:
    with attempt.tcp(NGINX) as connection:
        connection.sendall(_get(attempt.allowed))
        attempt.drain(connection, 0.3)
        connection.sendall(b"GET /slow HTTP/1.1\r\n")
        time.sleep(2.5)
        connection.sendall(f"Host: {name}\r\n\r\n".encode())
        attempt.drain(connection)


def _in_segments(count: int, attempt: Attempt, name: str) -> None:
    with attempt.tcp(NGINX) as connection:
        connection.sendall(_get(attempt.allowed))
        attempt.drain(connection, 0.3)
        for piece in (b"GET /pieces HTTP/1.1\r\n", *[b"X: 1\r\n"] * count, f"Host: {name}\r\n\r\n".encode()):
            connection.sendall(piece)
            time.sleep(0.01)
        attempt.drain(connection)


def _large(attempt: Attempt, name: str) -> None:
    with attempt.tcp(NGINX) as connection:
        connection.sendall(_get(attempt.allowed))
        attempt.drain(connection, 0.3)
        head = b"GET /large HTTP/1.1\r\n" + b"".join(b"X-%d: %s\r\n" % (number, b"x" * 990) for number in range(20))
        connection.sendall(head + f"Host: {name}\r\n\r\n".encode())
        attempt.drain(connection)


def _body(attempt: Attempt, name: str) -> None:
    """A request in the middle of a segment, behind the end of a body."""
    first = f"POST /body HTTP/1.1\r\nHost: {attempt.allowed}\r\nContent-Length: 3000\r\n\r\n".encode()
    attempt.say(NGINX, first + b"x" * 1000, b"x" * 2000 + _get(name, path="/behind"))


def _chunks(attempt: Attempt, name: str) -> None:
    first = f"POST /chunks HTTP/1.1\r\nHost: {attempt.allowed}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    attempt.say(NGINX, first + b"5\r\nhello\r\n", b"3;x=y\r\nfoo\r\n0\r\nTrailer: 1\r\n\r\n" + _get(name, path="/behind"))


def _body_that_looks_like_a_request(attempt: Attempt, name: str) -> None:
    """The body is an allowed request, the request behind it is not: who takes the body for a request judges that."""
    inner = _get(attempt.allowed)
    first = f"POST /b HTTP/1.1\r\nHost: {attempt.allowed}\r\nContent-Length: {len(inner)}\r\n\r\n".encode()
    attempt.say(NGINX, first, inner + _get(name, path="/behind"))


def _split_chunks(attempt: Attempt, name: str) -> None:
    """Fifty chunks, each of which begins at the end of one segment and ends in the next."""
    first = f"POST /chunks HTTP/1.1\r\nHost: {attempt.allowed}\r\nTransfer-Encoding: chunked\r\n\r\n5".encode()
    attempt.say(NGINX, first, *[b"\r\nhello\r\n5"] * 50, b"\r\nhello\r\n0\r\n\r\n" + _get(name, path="/behind"), pause=0.005)


def _body_not_read(attempt: Attempt, name: str, pieces: int = 1) -> None:
    """The server answers HEAD without reading the body, and takes that for the next request."""
    inner = _get(name)
    head = f"HEAD / HTTP/1.1\r\nHost: {attempt.allowed}\r\nContent-Length: {len(inner)}\r\n\r\n".encode()
    size = -(-len(inner) // pieces)
    parts = [inner[at : at + size] for at in range(0, len(inner), size)]
    attempt.say(PYTHON, head + parts[0], *parts[1:], pause=0.005)


def _body_continued(attempt: Attempt, name: str) -> None:
    """The body is the beginning of the method alone, which what follows completes."""
    inner = _get(name)
    head = f"HEAD / HTTP/1.1\r\nHost: {attempt.allowed}\r\nContent-Length: 4\r\n\r\n".encode()
    attempt.say(PYTHON, head + inner)


def _split(attempt: Attempt, name: str) -> None:
    """Every byte of the name in a segment of its own."""
    attempt.say(NGINX, b"GET /split HTTP/1.1\r\nHost: ", *[bytes((byte,)) for byte in name.encode()], b"\r\n\r\n", pause=0.002)


def _urgent(attempt: Attempt, name: str) -> None:
    """On the wire the name is an allowed one; without the urgent byte, which no application reads, it is not."""
    before, after = name.split("used")
    with attempt.tcp(PLAIN) as connection:
        connection.sendall(f"GET / HTTP/1.1\r\nHost: {before}u".encode())
        connection.send(b"u", socket.MSG_OOB)
        connection.sendall(f"sed{after}\r\n\r\n".encode())
        attempt.drain(connection)


def _mptcp(attempt: Attempt, name: str) -> None:
    """Over MPTCP, which may spread the bytes over several connections."""
    kind = socket.AF_INET if attempt.family == 4 else socket.AF_INET6
    with socket.socket(kind, socket.SOCK_STREAM, socket.IPPROTO_MPTCP) as connection:
        connection.settimeout(30)
        connection.connect((attempt.address, PLAIN))
        connection.sendall(_get(name))
        attempt.drain(connection)


def _ended(attempt: Attempt, name: str) -> None:
    """A head without the empty line at its end, and the end of the stream, which the server takes for it."""
    with attempt.tcp(PYTHON) as connection:
        connection.sendall(f"GET / HTTP/1.1\r\nHost: {name}\r\n\r".encode())
        connection.shutdown(socket.SHUT_WR)
        attempt.drain(connection)


LINES = (
    Line("http-mptcp", "HTTP: a request over an MPTCP connection", _mptcp),
    Line("http-version-2", "HTTP: HTTP/2 in clear text, without asking for it", _version_2),
    Line("http-ended", "HTTP: the client ends its side of the connection before the head is whole", _ended),
    *(
        Line(f"http-{name}", f"HTTP: {text}", partial(alone, template, port=port))
        for name, (text, template, port) in SPELLINGS.items()
    ),
    *(
        Line(f"http-after-{name}", f"HTTP, behind an allowed request: {text}", partial(after, template, port=port))
        for name, (text, template, port) in SPELLINGS.items()
    ),
    Line(
        "http-next-request",
        "HTTP: a second request on the connection",
        partial(after, "GET / HTTP/1.1\r\nHost: <N>\r\n\r\n"),
        twin=True,
    ),
    Line(
        "http-pipelined",
        "HTTP: two requests in one segment",
        partial(_two, "GET /first HTTP/1.1\r\nHost: <A>\r\n\r\n"),
        twin=True,
    ),
    Line(
        "http-pipelined-between",
        "HTTP: three requests in one segment, the one between is denied",
        partial(_two, "GET /first HTTP/1.1\r\nHost: <A>\r\n\r\n", last="GET /third HTTP/1.1\r\nHost: <A>\r\n\r\n"),
        twin=True,
    ),
    Line(
        "http-pipelined-behind-a-body",
        "HTTP: a request behind the body of another in one segment",
        partial(_two, "POST /first HTTP/1.1\r\nHost: <A>\r\nContent-Length: 5\r\n\r\nhello"),
        twin=True,
    ),
    Line("http-behind-a-body", "HTTP: a request in the middle of a segment, behind the end of a body", _body, twin=True),
    Line("http-behind-chunks", "HTTP: a request in the middle of a segment, behind the last chunk", _chunks, twin=True),
    Line(
        "http-body-like-a-request",
        "HTTP: a body that looks like an allowed request before a denied one",
        _body_that_looks_like_a_request,
        twin=True,
    ),
    Line("http-split-chunks", "HTTP: behind fifty chunks whose sizes are split between segments", _split_chunks, twin=True),
    Line("http-body-not-read", "HTTP: a request as the body of another, at a server that does not read the body", _body_not_read),
    Line(
        "http-body-not-read-split",
        "HTTP: the same, each byte of it in a segment of its own",
        partial(_body_not_read, pieces=64),
    ),
    Line("http-body-continued", "HTTP: the same, the body being `GET ` alone, and the rest behind it", _body_continued),
    Line("http-slow", "HTTP, behind an allowed request: 2.5 s before the Host field", _slow),
    Line(
        "http-ten-segments",
        "HTTP, behind an allowed request: ten small segments before Host",
        partial(_in_segments, 10),
        twin=True,
    ),
    Line("http-sixty-segments", "HTTP, behind an allowed request: sixty small segments before Host", partial(_in_segments, 60)),
    Line("http-large", "HTTP, behind an allowed request: 20 KB of fields before Host", _large),
    Line("http-split-name", "HTTP: each byte of the name in a segment of its own", _split, twin=True),
    Line(
        "http-urgent", "HTTP: a byte of TCP urgent data inside the name (`MSG_OOB`), which the application does not read", _urgent
    ),
)
