"""Chaos: its odds, and what real programs get to see of it."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from agent import Agent
from namespace import Namespace

from nfq_agent.host.nfqueue.statistics import statistics

SERVER = Path(__file__).parent.parent / "support" / "tcp_server.py"
HERE, THERE = "192.0.2.1:40000", "192.0.2.2:80"


# In a kernel: datagrams on loopback, on their way out.

CONFIG = """
[queue.main]
num = 100
gso = false
elements = ["chaos"]
[element.chaos]
seed = 1
{options}
[rules.app]
queue = "main"
hooks = ["{hook}"]
udp_ports = [11000]
tcp_ports = [11000]
role = "{role}"
"""
HOSTS = pytest.mark.parametrize("host", ["127.0.0.1", "::1"])


def agent(netns: Namespace, folder: Path, options: str, hook: str = "output") -> Agent:
    role = "client" if hook == "output" else "server"
    return Agent(netns, folder, CONFIG.format(options=options, hook=hook, role=role)).ready()


def datagrams(host: str, count: int, quiet: float) -> list[tuple[float, bytes]]:
    """Send so many; what arrives until nothing does for `quiet` seconds, with the seconds since it was sent. Runs inside."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    receiver = socket.socket(family, socket.SOCK_DGRAM)
    receiver.bind((host, 11000))
    receiver.settimeout(quiet)
    sender = socket.socket(family, socket.SOCK_DGRAM)
    sent = []
    for number in range(count):
        sent.append(time.monotonic())
        sender.sendto(b"%06d" % number, (host, 11000))
    arrived: list[tuple[float, bytes]] = []
    while True:
        try:
            data = receiver.recv(100)
        except TimeoutError:
            if statistics()[100].waiting:
                # The agent has not come so far yet.
                continue
            return arrived
        number = int(data) if data.isdigit() and int(data) < count else 0
        arrived.append((time.monotonic() - sent[number], data))


@pytest.mark.kernel
@HOSTS
def test_drops(netns: Namespace, tmp_path: Path, host: str) -> None:
    running = agent(netns, tmp_path, "drop = 0.5")
    arrived = netns.call(datagrams, host, 400, 1.0)
    assert 140 < len(arrived) < 260
    assert running.totals()["dropped"] == 400 - len(arrived)
    assert running.stop() == 0


@pytest.mark.kernel
@HOSTS
def test_delays_by_the_time_and_in_bounds(netns: Namespace, tmp_path: Path, host: str) -> None:
    running = agent(netns, tmp_path, 'delay = 1.0\ndelay_for = "2s"\nwaiting = 60')
    arrived = netns.call(datagrams, host, 100, 0.5)
    late = [seconds for seconds, _ in arrived if seconds > 1.9]
    assert len(arrived) == 100
    assert len(late) == 60
    assert running.stop() == 0


@pytest.mark.kernel
@HOSTS
def test_what_waits_when_the_agent_stops_arrives(netns: Namespace, tmp_path: Path, host: str) -> None:
    running = agent(netns, tmp_path, 'delay = 1.0\ndelay_for = "4s"')
    code = (
        "import socket, sys\n"
        "family = socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET\n"
        "receiver = socket.socket(family, socket.SOCK_DGRAM)\n"
        "receiver.bind((sys.argv[1], 11000))\n"
        "receiver.settimeout(60)\n"
        "for number in range(20): receiver.sendto(b'%d' % number, (sys.argv[1], 11000))\n"
        "print('sent', flush=True)\n"
        "print(len([receiver.recv(9) for number in range(20)]), flush=True)\n"
    )
    client = netns.start(sys.executable, "-c", code, host, stdout=subprocess.PIPE)
    assert client.stdout is not None
    assert client.stdout.readline() == b"sent\n"
    # They come with the stop, and would come 4 s after they were sent: it says that none had.
    assert statistics(netns.pid)[100].waiting == 20
    assert running.stop() == 0
    assert client.stdout.readline() == b"20\n"


@pytest.mark.kernel
@HOSTS
@pytest.mark.parametrize("hook", ["output", "input"])
def test_duplicates(netns: Namespace, tmp_path: Path, host: str, hook: str) -> None:
    running = agent(netns, tmp_path, "duplicate = 1.0", hook)
    arrived = sorted(data for _, data in netns.call(datagrams, host, 50, 1.0))
    assert arrived == sorted([b"%06d" % number for number in range(50)] * 2)
    assert running.stop() == 0


@pytest.mark.kernel
@HOSTS
def test_corruption_is_dropped_by_the_receiver_or_reaches_it(netns: Namespace, tmp_path: Path, host: str) -> None:
    running = agent(netns, tmp_path, "corrupt = 1.0")
    assert netns.call(datagrams, host, 20, 1.0) == []
    running.configure(CONFIG.format(options='corrupt = 1.0\nchecksum = "mend"', hook="output", role="client"))
    running.verb("reload")
    arrived = [data for _, data in netns.call(datagrams, host, 20, 1.0)]
    assert len(arrived) == 20
    assert all(data != b"%06d" % number for number, data in enumerate(arrived))
    assert running.stop() == 0


@pytest.mark.kernel
@HOSTS
def test_tcp_gets_through_all_of_it(netns: Namespace, tmp_path: Path, host: str) -> None:
    netns.run("ip", "link", "set", "lo", "mtu", "1500")
    options = 'drop = 0.02\nduplicate = 0.05\ncorrupt = 0.02\ndelay = 0.05\ndelay_for = "20ms"\njitter = "10ms"'
    running = agent(netns, tmp_path, options)
    server = netns.start(
        sys.executable,
        str(Path(__file__).parent.parent / "support" / "tcp_server.py"),
        "echo",
        host,
        "11000",
        stdout=subprocess.PIPE,
    )
    assert server.stdout is not None
    server.stdout.readline()
    text = "".join(f"{number}\n" for number in range(50_000))
    assert netns.run("nc", "-N", host, "11000", input=text).stdout == text
    seen = running.totals()
    assert seen["dropped"] > 0
    assert seen["rewritten"] > 0
    assert running.stop() == 0
