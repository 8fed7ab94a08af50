"""What curl sends over SOCKS, FTP and POP3, with TLS and without: read by the parsers as the parsers' modules say."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from nfq_agent.protocols import Found
from nfq_agent.protocols.known import PARSERS

# What the server says first, and how it answers the client's lines; what is left out gets nothing and ends the conversation.
FTP = {b"": b"220 ftp.server.test ready\r\n", b"AUTH": b"234 go on\r\n", b"USER": b"331 password\r\n"}
POP3 = {b"": b"+OK pop.server.test ready\r\n", b"CAPA": b"+OK\r\nUSER\r\nSTLS\r\n.\r\n", b"STLS": b"+OK go on\r\n"}
SOCKS4 = {b"\4": bytes((0, 90)) + bytes(6)}
SOCKS5 = {b"\5": b"\5\0", b"\5\1": b"\5\0\0\1" + bytes(6)}


class Server(threading.Thread):
    """One connection on a port of the loopback: greets, answers by the first word, and keeps both sides' bytes."""

    def __init__(self, answers: dict[bytes, bytes]) -> None:
        super().__init__(daemon=True)
        self._answers = answers
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.client = self.server = b""

    def run(self) -> None:
        connection, _ = self._listener.accept()
        with self._listener, connection:
            connection.settimeout(60)
            answer = self._answers.get(b"", b"")
            while True:
                try:
                    if answer:
                        connection.sendall(answer)
                        self.server += answer
                    data = connection.recv(65536)
                except OSError:
                    return
                if not data:
                    return
                self.client += data
                keys = sorted((key for key in self._answers if key and data.startswith(key)), key=len)
                if not keys:
                    return
                answer = self._answers[keys[-1]]


CASES: list[tuple[str, dict[bytes, bytes], Sequence[str], dict[str, Any]]] = [
    (
        "ftp",
        FTP,
        ("ftp://ann:secret@127.0.0.1:{port}/",),
        {"protocol": "ftp", "ftp_user": "ann", "ftp_banner": "ftp.server.test ready"},
    ),
    (
        "ftp-tls",
        FTP,
        ("-k", "--ssl-reqd", "--resolve", "ftp.test:{port}:127.0.0.1", "ftp://ftp.test:{port}/"),
        {"protocol": "ftp", "tls_sni": "ftp.test"},
    ),
    (
        "pop3",
        {**POP3, b"CAPA": b"+OK\r\nUSER\r\n.\r\n"},
        ("pop3://ann:secret@127.0.0.1:{port}/",),
        {"protocol": "pop3", "pop3_banner": "pop.server.test ready"},
    ),
    (
        "pop3-tls",
        POP3,
        ("-k", "--ssl-reqd", "--resolve", "pop.test:{port}:127.0.0.1", "pop3://pop.test:{port}/"),
        {"protocol": "pop3", "tls_sni": "pop.test"},
    ),
    (
        "socks4",
        SOCKS4,
        ("--socks4", "127.0.0.1:{port}", "http://192.0.2.7/"),
        {"protocol": "socks", "socks_version": "4", "socks_host": "192.0.2.7"},
    ),
    (
        "socks4a",
        SOCKS4,
        ("--socks4a", "127.0.0.1:{port}", "http://A.server.test/"),
        {"protocol": "socks", "socks_host": "a.server.test"},
    ),
    (
        "socks5",
        SOCKS5,
        ("--socks5", "127.0.0.1:{port}", "http://192.0.2.7/"),
        {"protocol": "socks", "socks_version": "5", "socks_host": "192.0.2.7"},
    ),
    (
        "socks5-name",
        SOCKS5,
        ("--socks5-hostname", "127.0.0.1:{port}", "http://a.server.test/"),
        {"protocol": "socks", "socks_host": "a.server.test"},
    ),
]


@pytest.mark.kernel
@pytest.mark.parametrize(("answers", "argv", "wanted"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_what_curl_sends(answers: dict[bytes, bytes], argv: Sequence[str], wanted: dict[str, Any]) -> None:
    server = Server(answers)
    server.start()
    arguments = [each.format(port=server.port) for each in argv]
    subprocess.run(["curl", "-s", "-m", "60", *arguments], capture_output=True, check=False)
    server.join(60)
    found = [result for parser in PARSERS if isinstance(result := parser(server.client, server.server), Found)]
    assert len(found) == 1, server.client
    assert found[0].decided
    assert {key: found[0].facts.get(key) for key in wanted} == wanted, server.client
