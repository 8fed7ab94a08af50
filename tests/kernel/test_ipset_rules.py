"""Rules by an ipset, in traffic."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from agent import Agent
from namespace import Namespace

pytestmark = pytest.mark.kernel

TEXT = """
[agent]
backend = "legacy"
[queue.main]
[rules.app]
queue = "main"
family = "inet"
hooks = ["output"]
udp_ports = [9]
"""


def send(source: str, destination: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.bind((source, 0))
        sender.sendto(b"x", (destination, 9))


@pytest.mark.parametrize(
    ("keys", "in_source", "in_destination", "in_neither"),
    [('set = "blocked"', 0, 1, 0), ('set = "blocked src"', 1, 0, 0), ('not_set = "blocked"', 1, 0, 1)],
)
def test_packets_by_an_ipset(
    netns: Namespace, tmp_path: Path, keys: str, in_source: int, in_destination: int, in_neither: int
) -> None:
    netns.shell("ipset create blocked hash:net; ipset add blocked 127.0.1.0/24")
    agent = Agent(netns, tmp_path, f"{TEXT}{keys}\n").ready()
    counts = []
    for source, destination in (("127.0.1.1", "127.0.0.1"), ("127.0.0.1", "127.0.1.1"), ("127.0.0.1", "127.0.0.1")):
        before = agent.totals()["received"]
        netns.call(send, source, destination)
        counts.append(agent.totals()["received"] - before)
    assert counts == [in_source, in_destination, in_neither]
    assert "Nothing to do" in agent.verb("plan").stdout
    assert agent.stop() == 0
