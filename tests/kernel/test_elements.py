"""How elements are found, the tutorial of docs/elements.md as it is printed there, and elements of others that misbehave."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from agent import Agent, until
from namespace import Namespace
from tutorial import block

SERVER = Path(__file__).parent.parent / "support" / "tcp_server.py"


def readable(folder: Path) -> None:
    """Let the agent's user get at what the test has put there."""
    for parent in (folder, *folder.parents):
        if "pytest-" in str(parent):
            parent.chmod(0o755)


@pytest.mark.kernel
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_tutorial_s_element_at_work(netns: Namespace, tutorial: Path, host: str) -> None:
    server = netns.start(sys.executable, str(SERVER), "echo", host, "22", stdout=subprocess.PIPE)
    assert server.stdout is not None
    server.stdout.readline()
    agent = Agent(netns, tutorial, block("nfq-agent.toml")).ready()
    assert netns.run("nc", "-N", host, "22", input="hello").stdout == "hello"
    for port in range(1000, 1006):
        netns.run("nc", "-z", "-w", "1", host, str(port), check=False)
    assert netns.run("nc", "-z", "-w", "1", host, "22", check=False).returncode != 0
    until(lambda: f"{host} is blocked: more than 5 ports" in agent.log, "it says so")
    assert agent.stop() == 0


# Elements of others that misbehave. Port 1 of the data's first byte says how.

BAD = """
import time
from nfq_agent import DROP, Needs, PacketElement

class Bad(PacketElement):
    needs = Needs.PAYLOAD

    def decide(self, packet, flow):
        data = packet.data
        if data.startswith(b"raise"):
            raise RuntimeError("as asked")
        if data.startswith(b"hang"):
            time.sleep(1)
        if data.startswith(b"eat"):
            self.eaten = bytearray(8 << 30)
        if data.startswith(b"leak"):
            self.leaked = leaked = []
            while True:
                leaked.append(object())
        if data.startswith(b"none"):
            return "no verdict"
        return DROP if data.startswith(b"drop") else None
"""
BAD_CONFIG = """
[queue.main]
elements = ["bad:Bad"]
on_error = "{on_error}"
gso = false
{queue}
[rules.app]
queue = "main"
hooks = ["output"]
role = "client"
udp_ports = [11000]
"""


class Wire:
    """Datagrams through the queue, inside a namespace."""

    CODE = textwrap.dedent(
        """
        import socket, sys
        host = sys.argv[1]
        wire = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        wire.bind((host, 11000))
        for line in sys.stdin:
            text, seconds = line.split()
            wire.settimeout(float(seconds))
            wire.sendto(text.encode(), (host, 11000))
            try:
                print(wire.recv(100).decode(), flush=True)
            except TimeoutError:
                print("-", flush=True)
        """
    )

    def __init__(self, netns: Namespace, host: str) -> None:
        pipe = subprocess.PIPE
        self.process = netns.start(sys.executable, "-c", self.CODE, host, stdin=pipe, stdout=pipe)

    def send(self, text: str, seconds: float = 30) -> str:
        """What arrives, or `-`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{text} {seconds}\n".encode())
        self.process.stdin.flush()
        line: bytes = self.process.stdout.readline()
        return line.decode().strip()


def bad_agent(netns: Namespace, folder: Path, on_error: str = "accept", queue: str = "") -> Agent:
    (folder / "elements").mkdir()
    (folder / "elements" / "bad.py").write_text(BAD)
    readable(folder)
    return Agent(netns, folder, BAD_CONFIG.format(on_error=on_error, queue=queue)).ready()


@pytest.mark.kernel
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("on_error", ["accept", "drop"])
def test_one_that_raises_costs_its_own_packets_their_verdict(netns: Namespace, tmp_path: Path, host: str, on_error: str) -> None:
    agent = bad_agent(netns, tmp_path, on_error)
    (pid,) = agent.workers()
    wire = Wire(netns, host)
    for text in ("raise-1", "none-2"):
        assert wire.send("fine") == "fine"
        assert wire.send("drop", 0.3) == "-"
        assert wire.send(text, 0.3 if on_error == "drop" else 30) == (text if on_error == "accept" else "-")
    assert wire.send("fine") == "fine"
    assert agent.totals()["errors"] == 2
    until(lambda: "RuntimeError: as asked" in agent.log, "it says what was raised")
    assert agent.workers() == [pid]
    assert agent.stop() == 0


@pytest.mark.kernel
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_one_that_hangs_for_a_second_costs_that_second(netns: Namespace, tmp_path: Path, host: str) -> None:
    agent = bad_agent(netns, tmp_path)
    (pid,) = agent.workers()
    wire = Wire(netns, host)
    begin = time.monotonic()
    assert wire.send("hang") == "hang"
    assert time.monotonic() - begin >= 1.0
    assert wire.send("fine") == "fine"
    assert agent.workers() == [pid]
    assert agent.stop() == 0


@pytest.mark.kernel
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_one_that_eats_memory_costs_its_packet_or_its_worker(netns: Namespace, tmp_path: Path, host: str) -> None:
    agent = bad_agent(netns, tmp_path, queue='memory = "150MB"')
    (pid,) = agent.workers()
    wire = Wire(netns, host)
    # More at once than it may have: an error as any other.
    assert wire.send("eat") == "eat"
    assert wire.send("fine") == "fine"
    assert agent.totals()["errors"] == 1
    until(lambda: "MemoryError" in agent.log, "it says so")
    assert agent.workers() == [pid]
    # Little by little, until no memory is left: the worker may need some itself, and end.
    assert wire.send("leak", 60) == "leak"
    assert until(lambda: wire.send("fine", 1) == "fine", "it serves")
    (worker,) = agent.queue()["workers"]
    assert worker["memory"] < 200_000_000
    # And when the kernel ends the worker for it, another one takes its place.
    pid = worker["pid"]
    os.kill(pid, 9)
    until(lambda: agent.workers() not in ([], [pid], [None]), "another worker")
    assert until(lambda: wire.send("fine", 1) == "fine", "it serves")
    assert agent.stop() == 0
