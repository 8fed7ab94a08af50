"""`room_for_known`: a flood of new flows by local users decides nothing about flows that were answered before."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from agent import Agent, until
from namespace import Namespace

pytestmark = pytest.mark.kernel

PORT = 4440
ADDRESSES = {4: "127.0.0.1", 6: "::1"}
CONFIG = """
[agent]
backend = "{backend}"
[queue.main]
num = 120
max_len = 64
fail_open = {fail_open}
bypass = {fail_open}
room_for_known = {room}
elements = ["dpi", "names"]
[element.names]
type = "policy"
default = "accept"
rule = [ {{ action = "drop", http_host = ["denied.test"] }} ]
[rules.app]
queue = "main"
hooks = ["output"]
tcp_ports = [4440]
udp_ports = [5300]
"""
# Each datagram is a new flow. Ends after 30 seconds at the latest. argv: address.
FLOOD = """
import os, socket, sys, time
address = sys.argv[1]
family = socket.AF_INET6 if ":" in address else socket.AF_INET
end = time.monotonic() + 30
while time.monotonic() < end and os.getppid() != 1:
    for _ in range(100):
        with socket.socket(family, socket.SOCK_DGRAM) as one:
            one.sendto(b"x", (address, 5300))
"""
# Answers each request. argv: address, port.
SERVER = """
import socket, sys, threading
address = sys.argv[1]
family = socket.AF_INET6 if ":" in address else socket.AF_INET
listener = socket.create_server((address, int(sys.argv[2])), family=family, backlog=256)
print("listening", flush=True)
def serve(connection):
    while data := connection.recv(65536):
        connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\n\\r\\n")
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""
# Sends so many requests for a host, each on its own connection; prints how many were answered. argv: address, port, host, count.
NEW = """
import socket, sys
address, port, host, count = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
answered = 0
for _ in range(count):
    connection = socket.create_connection((address, port), timeout=20)
    connection.settimeout(0.1)
    connection.sendall(f"GET / HTTP/1.1\\r\\nHost: {host}\\r\\n\\r\\n".encode())
    try:
        answered += bool(connection.recv(100))
    except TimeoutError:
        pass
print(answered)
"""
# One connection; for each number on standard input so many requests for allowed.test, and a line when all are answered.
KEPT = """
import socket, sys
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=60)
print("connected", flush=True)
for line in sys.stdin:
    for _ in range(int(line)):
        connection.sendall(b"GET / HTTP/1.1\\r\\nHost: allowed.test\\r\\n\\r\\n")
        assert connection.recv(100)
    print("answered", flush=True)
"""


def config(room: int = 512, fail_open: bool = True, backend: str = "legacy") -> str:
    """A queue of 64 places, which takes both what is flooded and what is judged."""
    return CONFIG.format(room=room, fail_open=str(fail_open).lower(), backend=backend)


@contextmanager
def flooded(netns: Namespace, agent: Agent, address: str, queue: str = "main") -> Iterator[None]:
    """While two processes of an unprivileged user send new flows, and the queue is full because of them."""
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--pdeathsig=KILL"]
    floods = [netns.start(*as_nobody, sys.executable, "-c", FLOOD, address) for _ in range(2)]
    try:
        until(lambda: passed_by(agent, queue) > 0, "the queue is full")
        yield
    finally:
        for each in floods:
            each.kill()
            each.wait()


def passed_by(agent: Agent, name: str = "main") -> int:
    """Packets that found the queue full."""
    queue = agent.queue(name)
    return int(queue["uninspected"] or 0) + int(queue["kernel_dropped"] or 0)


def serve(netns: Namespace, address: str) -> subprocess.Popen[str]:
    """The server, once it listens."""
    server = netns.start(sys.executable, "-c", SERVER, address, str(PORT), stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    assert server.stdout.readline() == "listening\n"
    return server


def denied_requests(netns: Namespace, address: str, count: int = 12) -> int:
    """How many of so many denied requests were answered."""
    return int(netns.run(sys.executable, "-c", NEW, address, str(PORT), "denied.test", str(count)).stdout)


class Kept:
    """A connection that was made before the flood."""

    def __init__(self, netns: Namespace, address: str) -> None:
        self._end = netns.start(
            sys.executable, "-c", KEPT, address, str(PORT), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._read() == "connected\n"

    def ask(self, requests: int) -> None:
        """Send so many requests, each after the answer to the one before."""
        assert self._end.stdin is not None
        self._end.stdin.write(f"{requests}\n")
        self._end.stdin.flush()
        assert self._read() == "answered\n"

    def _read(self) -> str:
        assert self._end.stdout is not None
        return str(self._end.stdout.readline())


@pytest.mark.parametrize(("backend", "version"), [("legacy", 4), ("owned", 6)])
def test_a_flood_lets_no_denied_request_pass(netns: Namespace, tmp_path: Path, backend: str, version: int) -> None:
    address = ADDRESSES[version]
    serve(netns, address)
    agent = Agent(netns, tmp_path, config(backend=backend)).ready()
    with flooded(netns, agent, address):
        assert denied_requests(netns, address) == 0
    assert agent.totals()["known_received"] > 0
    assert agent.stop() == 0


def test_without_room_a_flood_lets_denied_requests_pass(netns: Namespace, tmp_path: Path) -> None:
    """What the room is for: here the flood decides for others."""
    serve(netns, "127.0.0.1")
    agent = Agent(netns, tmp_path, config(room=0)).ready()
    with flooded(netns, agent, "127.0.0.1"):
        until(lambda: denied_requests(netns, "127.0.0.1", 3) > 0, "one passes")
    assert agent.stop() == 0


def dropped(netns: Namespace) -> dict[int, int]:
    """The queue numbers that the kernel has, with the packets that it dropped there: full, or the socket's buffer full."""
    lines = netns.run("cat", "/proc/net/netfilter/nfnetlink_queue").stdout.splitlines()
    return {int(words[0]): int(words[5]) + int(words[6]) for words in map(str.split, lines)}


def bound(netns: Namespace) -> list[int]:
    """The queue numbers that the kernel has."""
    return sorted(dropped(netns))


@pytest.mark.parametrize(("backend", "version"), [("legacy", 6), ("owned", 4)])
def test_a_flood_drops_nothing_of_a_known_flow(netns: Namespace, tmp_path: Path, backend: str, version: int) -> None:
    address = ADDRESSES[version]
    serve(netns, address)
    agent = Agent(netns, tmp_path, config(fail_open=False, backend=backend)).ready()
    kept = Kept(netns, address)
    with flooded(netns, agent, address):
        before = agent.queue()["kernel_dropped"]
        kept.ask(20)
        until(lambda: agent.queue()["kernel_dropped"] > before, "the flood continues")
        assert dropped(netns)[121] == 0
    assert agent.totals()["known_received"] > 40
    assert agent.stop() == 0


def known_of(agent: Agent, kept: Kept) -> int:
    """Packets of twenty more requests that came by the second queue. None passes unjudged."""
    before = agent.totals()["known_received"]
    kept.ask(20)
    queue = agent.queue()
    assert queue["uninspected"] == 0
    return int(queue["workers"][0]["known_received"]) - before


def test_a_reload_adds_the_room_and_removes_it(netns: Namespace, tmp_path: Path) -> None:
    serve(netns, "127.0.0.1")
    agent = Agent(netns, tmp_path, config(room=0)).ready()
    kept = Kept(netns, "127.0.0.1")
    assert known_of(agent, kept) == 0
    assert bound(netns) == [120]
    agent.configure(config(room=77))
    agent.verb("reload")
    assert bound(netns) == [120, 121]
    assert agent.queue()["in_force"]["room_for_known"] == 77
    (pid,) = agent.workers()
    netns.run("kill", "-9", str(pid))
    until(lambda: agent.workers() not in ([pid], [None]), "another worker serves")
    assert known_of(agent, kept) >= 40
    agent.configure(config(room=0))
    agent.verb("reload")
    assert bound(netns) == [120]
    assert known_of(agent, kept) == 0
    assert agent.stop() == 0
    assert bound(netns) == []


@pytest.mark.parametrize("backend", ["legacy", "owned"])
def test_a_restart_keeps_the_room_until_the_file_says_otherwise(netns: Namespace, tmp_path: Path, backend: str) -> None:
    serve(netns, "127.0.0.1")
    agent = Agent(netns, tmp_path, config(backend=backend)).ready()
    kept = Kept(netns, "127.0.0.1")
    agent.verb("restart")
    assert known_of(agent, kept) >= 40
    agent.configure(config(room=0, backend=backend))
    agent.verb("restart")
    assert bound(netns) == [120]
    assert known_of(agent, kept) == 0
    assert agent.stop() == 0


def test_a_reload_that_fails_closes_the_room_that_it_opened(netns: Namespace, tmp_path: Path) -> None:
    serve(netns, "127.0.0.1")
    agent = Agent(netns, tmp_path, config(room=0)).ready()
    kept = Kept(netns, "127.0.0.1")
    # The queue is replaced first; then the change of the rules fails.
    lock = netns.start("flock", "--close", "/run/xtables.lock", "-c", "echo held; sleep 60", stdout=subprocess.PIPE, text=True)
    assert lock.stdout is not None
    assert lock.stdout.readline() == "held\n"
    agent.configure(config(room=77))
    assert agent.verb("reload", check=False).returncode != 0
    lock.kill()
    lock.wait()
    assert bound(netns) == [120]
    assert known_of(agent, kept) == 0
    assert agent.stop() == 0


OWN_QUEUE = (
    CONFIG.replace("udp_ports = [5300]", "udp_ports = [5300]\nnot_uid = [65534]")
    + """
[queue.users]
num = 130
max_len = 64
fail_open = {fail_open}
bypass = {fail_open}
elements = ["dpi", "names"]
[rules.users]
queue = "users"
hooks = ["output"]
tcp_ports = [4440]
udp_ports = [5300]
uid = [65534]
"""
)


@pytest.mark.parametrize(("backend", "version"), [("legacy", 4), ("owned", 6)])
def test_a_flood_of_one_user_in_a_queue_of_its_own_decides_for_no_new_flow_of_others(
    netns: Namespace, tmp_path: Path, backend: str, version: int
) -> None:
    """Rules by `uid` give each their own room, for the first packets too."""
    address = ADDRESSES[version]
    serve(netns, address)
    agent = Agent(netns, tmp_path, OWN_QUEUE.format(room=0, fail_open="true", backend=backend)).ready()
    with flooded(netns, agent, address, "users"):
        assert denied_requests(netns, address) == 0
        assert passed_by(agent) == 0
    assert agent.stop() == 0
