"""MPTCP on judged ports: `dpi` calls it a conflict, and `refuse-mptcp` makes it plain TCP, which is judged by its names."""

from __future__ import annotations

import socket
import struct
from functools import partial
from pathlib import Path

import pytest
from agent import Agent, until
from captures import listening
from namespace import Namespace

pytestmark = pytest.mark.kernel

PORT = 8080
# linux/mptcp.h
_SOL_MPTCP, _MPTCP_INFO = 284, 1
_SERVER = f"""
import socket
listener = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_MPTCP)
listener.bind(("::", {PORT}))
listener.listen()
while True:
    connection, _ = listener.accept()
    connection.settimeout(5)
    try:
        while data := connection.recv(1000):
            connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nok")
    except OSError:
        pass
"""
_CONFIG = """
[queue.main]
num = 150
elements = [ELEMENTS"dpi", "names"]

[element.names]
type = "policy"
default = "drop"
rule = [ { action = "accept", http_host = ["*.good.test"] } ]

[rules.main]
queue = "main"
hooks = ["output"]
tcp_ports = [8080]
role = "client"
"""


def asked(host: str, name: str, seconds: float = 60) -> tuple[bytes, bool]:
    """The answer to a request, and whether it went over MPTCP."""
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(kind, socket.SOCK_STREAM, socket.IPPROTO_MPTCP) as client:
        client.settimeout(60)
        client.connect((host, PORT))
        try:
            # subflows, then five numbers of a byte each, then the flags, of which bit 0 is the fall back to TCP.
            info = client.getsockopt(_SOL_MPTCP, _MPTCP_INFO, 12)
            over = not struct.unpack_from("I", info, 8)[0] & 1
        except OSError:
            over = False
        client.sendall(f"GET / HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())
        client.settimeout(seconds)
        try:
            return client.recv(1000), over
        except TimeoutError:
            return b"", over


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_mptcp_is_refused_and_names_are_judged(netns: Namespace, tmp_path: Path, host: str) -> None:
    if netns.run("sysctl", "-n", "net.mptcp.enabled", check=False).stdout.strip() != "1":
        pytest.skip("this kernel has no MPTCP")
    netns.start("python3", "-c", _SERVER)
    until(partial(listening, netns, PORT), "the server listens")
    answer, over = netns.call(asked, host, "a.good.test")
    assert (answer[-2:], over) == (b"ok", True), "MPTCP does not work here without an agent"
    agent = Agent(netns, tmp_path, _CONFIG.replace("ELEMENTS", "")).ready()
    assert netns.call(asked, host, "a.good.test", 1.5) == (b"", True)
    assert "conflict: MPTCP" in agent.log
    agent.stop()
    agent = Agent(netns, tmp_path, _CONFIG.replace("ELEMENTS", '"refuse-mptcp", ')).ready()
    answer, over = netns.call(asked, host, "a.good.test")
    assert answer.endswith(b"ok")
    assert not over
    assert netns.call(asked, host, "a.evil.test", 1.5) == (b"", False)
    assert agent.stop() == 0
