"""The servers of the evasion tests that have to say what they understood: one process, one line in a log for each message.

Run as `python evasion_servers.py FOLDER`: cert.pem and key.pem are there, and `seen.log` is written there. A line is the
server's name and what it understood: a host name, or for `plain` the text in the bytes that its application read.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import os
import socket
import socketserver
import ssl
import sys
import threading
from pathlib import Path
from typing import Any

from aioquic import tls as quic_tls
from aioquic.asyncio.server import serve
from aioquic.quic.configuration import QuicConfiguration

TLS, QUIC, PLAIN, PYTHON = 4430, 4433, 4440, 8080
# What counts the bytes that it reads, and what talks all the time.
COUNTING, TALKING = 4442, 4443
# Bytes that it says.
TALK = 400_000
# The same servers behind other rules.
PROVEN_TLS, PROVEN_PLAIN, GATE_PYTHON = 4431, 4441, 8007
TLS_PORTS, PLAIN_PORTS, HTTP_PORTS = (TLS, PROVEN_TLS), (PLAIN, PROVEN_PLAIN), (PYTHON, GATE_PYTHON)


class Seen:
    """The log. One write for each line, so that lines of several threads do not mix."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def __call__(self, server: str, what: str) -> None:
        os.write(self._descriptor, f"{server} {what}\n".encode())


class _Server(socketserver.ThreadingTCPServer):
    address_family = socket.AF_INET6
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 256


class _MptcpServer(_Server):
    """Takes MPTCP as well as TCP."""

    def __init__(self, address: tuple[str, int], handler: type[socketserver.BaseRequestHandler]) -> None:
        super().__init__(address, handler, bind_and_activate=False)
        self.socket.close()
        self.socket = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_MPTCP)
        self.server_bind()
        self.server_activate()


def tls(port: int, folder: Path, seen: Seen) -> None:
    """OpenSSL, by way of Python. It takes one group alone, so that a client that offers another share is asked again."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    context.set_ecdh_curve("secp384r1")
    context.sni_callback = lambda _, name, __: seen("tls", name or "-")

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.settimeout(8)
            try:
                with context.wrap_socket(self.request, server_side=True) as connection:
                    connection.recv(1000)
            except (OSError, ValueError):
                pass

    _Server(("::", port), Handler).serve_forever()


def plain(port: int, seen: Seen) -> None:
    """An application that reads a stream and writes down what it read, all of it, each time more has come."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.settimeout(8)
            whole = b""
            try:
                while data := self.request.recv(65536):
                    whole += data
                    seen("plain", "".join(chr(byte) if 33 <= byte < 127 else " " for byte in whole))
                    self.request.sendall(b"ok")
            except OSError:
                pass

    _MptcpServer(("::", port), Handler).serve_forever()


def counting(port: int, seen: Seen) -> None:
    """An application that reads a stream and writes down how much of it has come."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.settimeout(8)
            address, number = self.client_address[:2]
            count = 0
            try:
                while data := self.request.recv(65536):
                    count += len(data)
                    seen("counted", f"{address.removeprefix('::ffff:')} {number} {count}")
            except OSError:
                pass

    _Server(("::", port), Handler).serve_forever()


def talking(port: int, seen: Seen) -> None:
    """An application that talks first, and all in one line."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.settimeout(8)
            with contextlib.suppress(OSError):
                for _ in range(TALK // 1000):
                    self.request.sendall(b"x" * 1000)

    _Server(("::", port), Handler).serve_forever()


def python(port: int, seen: Seen) -> None:
    """Python's own HTTP server, with connections that are kept."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 8

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            seen("python", f"{self.headers.get('Host')} {self.path}")
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        do_POST = do_GET

        def do_HEAD(self) -> None:
            """As many programs have it: the body is not read, and is the next request."""
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Nothing but what was understood is written."""

    _Server(("::", port), Handler).serve_forever()


def quic(folder: Path, seen: Seen) -> None:
    """aioquic, which tells us each ClientHello that it has read."""
    read = quic_tls.pull_client_hello

    def told(buf: Any) -> quic_tls.ClientHello:
        hello = read(buf)
        seen("quic", hello.server_name or "-")
        return hello

    setattr(quic_tls, "pull_client_hello", told)  # noqa: B010  # a function of the library is replaced, which no type allows

    async def run() -> None:
        configuration = QuicConfiguration(is_client=False, alpn_protocols=["h3"])
        configuration.load_cert_chain(folder / "cert.pem", folder / "key.pem")
        # Of both families.
        await serve("::", QUIC, configuration=configuration)
        await asyncio.Event().wait()

    asyncio.run(run())


def main() -> None:
    """Serve until the end."""
    folder = Path(sys.argv[1])
    seen = Seen(folder / "seen.log")
    for server, ports, arguments in (
        (tls, TLS_PORTS, (folder, seen)), (plain, PLAIN_PORTS, (seen,)), (python, HTTP_PORTS, (seen,)),
        (counting, (COUNTING,), (seen,)), (talking, (TALKING,), (seen,)),
    ):  # fmt: skip
        for port in ports:
            threading.Thread(target=server, args=(port, *arguments), daemon=True).start()
    quic(folder, seen)


if __name__ == "__main__":
    main()
