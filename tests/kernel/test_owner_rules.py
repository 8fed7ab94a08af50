"""A rule of one user's traffic also takes what the kernel sends for that user after close and exit, which has no owner."""

from __future__ import annotations

import os
import socket
import time
from functools import partial
from pathlib import Path

import pytest
from agent import Agent, until
from captures import listening
from namespace import UNPRIVILEGED, Namespace

pytestmark = pytest.mark.kernel

PORT = 8080
_SERVER = f"""
import socket, sys, threading
def serve(connection):
    with connection, open(sys.argv[1], "ab", buffering=0) as log:
        log.write(connection.recv(1000) + b"\\n")
listener = socket.socket(socket.AF_INET6)
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(("::", {PORT}))
listener.listen()
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""
_CONFIG = """
[agent]
backend = "BACKEND"

[queue.main]
num = 160
fail_open = false
elements = ["dpi", "names"]

[element.names]
type = "policy"
default = "accept"
rule = [ { action = "drop", http_host = ["*.evil.test"] } ]

[rules.nobody]
queue = "main"
hooks = ["output"]
tcp_ports = [8080]
SELECT
"""


def send_and_exit(host: str, name: str, uid: int) -> None:
    """A request, and at once the end of the process that made it: what is sent again has no owner."""
    if (child := os.fork()) == 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        client = socket.create_connection((host, PORT))
        client.sendall(f"GET / HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())
        os._exit(0)
    os.waitpid(child, 0)


@pytest.mark.parametrize(
    ("backend", "select"), [("legacy", "owner = 65534"), ("legacy", "uid = [1, 65534]"), ("owned", "gid = 65534")]
)
def test_a_dropped_request_does_not_arrive_after_its_process_has_ended(
    netns: Namespace, tmp_path: Path, backend: str, select: str
) -> None:
    seen = tmp_path / "seen"
    seen.touch()
    netns.start("python3", "-c", _SERVER, str(seen))
    until(partial(listening, netns, PORT), "the server listens")
    agent = Agent(netns, tmp_path, _CONFIG.replace("BACKEND", backend).replace("SELECT", select)).ready()
    for family, host in ((4, "127.0.0.1"), (6, "::1")):
        netns.call(send_and_exit, host, f"x{family}.evil.test", UNPRIVILEGED)
    # What the kernel sends again comes 0.2 s later, and then after twice as long each time.
    time.sleep(1.6)
    assert b"evil" not in seen.read_bytes()
    until(lambda: agent.totals()["dropped"] >= 4, "both requests are dropped, and are sent again")
    # Another user's traffic does not match the rule.
    netns.call(send_and_exit, "127.0.0.1", "other.evil.test", 4321)
    until(lambda: b"other.evil" in seen.read_bytes(), "the request of another user arrives")
    assert agent.stop() == 0
