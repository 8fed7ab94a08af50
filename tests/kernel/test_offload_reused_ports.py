"""Connections on the ports of earlier ones whose verdicts the kernel keeps, in a real kernel: each is judged by what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from agent import Agent
from namespace import Namespace
from tcp_client import server

from nfq_agent.service.packet_judge import EVERY_PACKET

pytestmark = pytest.mark.kernel

PORT, HERE = 4440, 40123
CONFIG = f"""
[queue.egress]
num = 110
elements = ["dpi", "allow", "offload"]
[element.allow]
type = "policy"
default = "drop"
rule = [{{ action = "accept", http_host = ["*.good.test"] }}]
[element.offload]
mark = "0x4e000000/0xff000000"
[rules.egress]
queue = "egress"
hooks = ["input", "output"]
tcp_ports = [{PORT}]
role = "both"
"""
# One request, and then a reset, so that the kernel tracks another connection on the same ports from then on.
CLIENT = """
import socket, struct, sys
host, port, here, name, seconds = sys.argv[1:]
connection = socket.socket()
connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
connection.settimeout(30)
connection.bind((host, int(here)))
connection.connect((host, int(port)))
request = f"GET / HTTP/1.1\\r\\nHost: {name}\\r\\n\\r\\n".encode()
connection.sendall(request)
connection.settimeout(float(seconds))
try:
    print("echoed" if connection.recv(65536) == request else "something else")
except TimeoutError:
    print("silence")
connection.close()
"""


def ask(netns: Namespace, name: str) -> str:
    """What comes back of a request for a name, from always the same port."""
    seconds = "60" if "good" in name else "1"
    return netns.run(sys.executable, "-c", CLIENT, "127.0.0.1", str(PORT), str(HERE), name, seconds).stdout.strip()


# Two requests, and two more when it is told to.
LASTING = f"""
import socket, sys
connection = socket.create_connection(("127.0.0.1", {PORT}), timeout=60)
def ask(name, seconds):
    request = f"GET / HTTP/1.1\\r\\nHost: {{name}}\\r\\n\\r\\n".encode()
    connection.settimeout(seconds)
    connection.sendall(request)
    try:
        print("echoed" if connection.recv(65536) == request else "something else", flush=True)
    except TimeoutError:
        print("silence", flush=True)
for _ in range(2):
    ask("www.good.test", 60)
    ask("www.good.test", 60)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("every", [False, True], ids=["compiled", "shown"])
def test_a_connection_that_tracking_has_forgotten_continues(netns: Namespace, tmp_path: Path, every: bool) -> None:
    """As `conntrack -F` makes it: the kernel let something pass that the agent has not seen."""
    server(netns, "echo", "127.0.0.1", PORT)
    agent = Agent(netns, tmp_path, CONFIG, **({EVERY_PACKET: "1"} if every else {})).ready()
    client = netns.start(sys.executable, "-c", LASTING, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert client.stdin is not None
    assert client.stdout is not None
    assert [client.stdout.readline() for _ in range(2)] == [b"echoed\n"] * 2
    netns.run("conntrack", "-F")
    client.stdin.write(b"\n")
    client.stdin.flush()
    assert [client.stdout.readline() for _ in range(2)] == [b"echoed\n"] * 2
    assert agent.stop() == 0


@pytest.mark.parametrize("every", [False, True], ids=["compiled", "shown"])
def test_each_connection_is_judged_by_what_it_says(netns: Namespace, tmp_path: Path, every: bool) -> None:
    server(netns, "echo", "127.0.0.1", PORT)
    environment = {EVERY_PACKET: "1"} if every else {}
    agent = Agent(netns, tmp_path, CONFIG, **environment).ready()
    asked = ["www.evil.test", "www.good.test", "www.good.test", "www.evil.test", "www.good.test"]
    assert [ask(netns, name) for name in asked] == ["silence", "echoed", "echoed", "silence", "echoed"]
    assert agent.stop() == 0


# It ends each connection by a reset. Connection tracking then ignores the SYN of the next one on the same ports, and keeps the
# mark.
RESETTING = f"""
import socket, struct
listening = socket.create_server(("127.0.0.1", {PORT}))
print("ready", flush=True)
while True:
    connection, _ = listening.accept()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    while data := connection.recv(65536):
        connection.sendall(data)
        # Until the client has it: a reset would throw away what waits.
        if connection.recv(1) == b"!":
            break
    connection.close()
"""
RESET = f"""
import socket, sys
name, seconds = sys.argv[1:]
connection = socket.socket()
connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
connection.bind(("127.0.0.1", {HERE}))
connection.settimeout(30)
connection.connect(("127.0.0.1", {PORT}))
request = f"GET / HTTP/1.1\\r\\nHost: {{name}}\\r\\n\\r\\n".encode()
connection.sendall(request)
connection.settimeout(float(seconds))
try:
    print("echoed" if connection.recv(65536) == request else "something else")
    connection.sendall(b"!")
    connection.settimeout(30)
    connection.recv(1)
except TimeoutError:
    print("silence")
except ConnectionResetError:
    print("reset")
"""


@pytest.mark.parametrize("every", [False, True], ids=["compiled", "shown"])
@pytest.mark.parametrize("backend", ["legacy", "owned"])
def test_a_connection_that_the_server_reset_leaves_no_mark_to_the_next(
    netns: Namespace, tmp_path: Path, every: bool, backend: str
) -> None:
    server = netns.start(sys.executable, "-c", RESETTING, stdout=subprocess.PIPE)
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    environment = {EVERY_PACKET: "1"} if every else {}
    agent = Agent(netns, tmp_path, f'[agent]\nbackend = "{backend}"\n{CONFIG}', **environment).ready()
    assert netns.run(sys.executable, "-c", RESET, "www.good.test", "60").stdout.split() == ["echoed", "reset"]
    assert netns.run(sys.executable, "-c", RESET, "www.evil.test", "1").stdout.split() == ["silence"]
    assert agent.stop() == 0
