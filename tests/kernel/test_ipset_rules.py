"""Rules by an ipset, in traffic."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from agent import Agent
from namespace import PATIENCE, Namespace

pytestmark = pytest.mark.kernel

TEXT = """
[agent]
backend = "BACKEND"
[queue.main]
[rules.app]
queue = "main"
hooks = ["output"]
udp_ports = [9]
"""


def send(source: str, destination: str) -> None:
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sender:
        sender.bind((source, 0))
        sender.sendto(b"x", (destination, 9))


@pytest.mark.parametrize("backend", ["legacy", "owned"])
@pytest.mark.parametrize(
    ("keys", "in_source", "in_destination", "in_neither"),
    [('set = "blocked"', 0, 1, 0), ('set = "blocked src"', 1, 0, 0), ('not_set = "blocked"', 1, 0, 1)],
)
def test_packets_by_an_ipset(
    netns: Namespace, tmp_path: Path, backend: str, keys: str, in_source: int, in_destination: int, in_neither: int
) -> None:
    netns.shell("ipset create blocked hash:net; ipset add blocked 127.0.1.0/24")
    agent = Agent(netns, tmp_path, f"{TEXT.replace('BACKEND', backend)}{keys}\n").ready()
    counts = []
    for source, destination in (("127.0.1.1", "127.0.0.1"), ("127.0.0.1", "127.0.1.1"), ("127.0.0.1", "127.0.0.1")):
        before = agent.totals()["received"]
        netns.call(send, source, destination)
        counts.append(agent.totals()["received"] - before)
    assert counts == [in_source, in_destination, in_neither]
    assert "Nothing to do" in agent.verb("plan").stdout
    # A packet of the other family is in no set of this one.
    before = agent.totals()["received"]
    netns.call(send, "::1", "::1")
    assert agent.totals()["received"] - before == keys.startswith("not_set")
    assert agent.stop() == 0


@pytest.mark.parametrize("backend", ["legacy", "owned"])
@pytest.mark.parametrize(
    ("keys", "why", "remedy"),
    [
        ('set = "absent"', "the ipset absent of rules.app does not exist", "`ipset create absent hash:net`"),
        (
            'set = "blocked"\nfamily = "inet6"',
            "rules.app takes packets by the ipset blocked, which holds IPv4 addresses",
            'set family = "inet"',
        ),
        ('not_set = "pairs src"', "of type hash:ip,port: 'pairs src' matches no packet", 'not_set = "pairs src,src"'),
    ],
)
def test_a_set_that_no_rule_can_use(netns: Namespace, tmp_path: Path, backend: str, keys: str, why: str, remedy: str) -> None:
    netns.shell("ipset create blocked hash:net; ipset create pairs hash:ip,port")
    agent = Agent(netns, tmp_path, f"{TEXT.replace('BACKEND', backend)}{keys}\n")
    assert agent.process.wait(PATIENCE) == 1
    plan = agent.verb("plan", check=False)
    assert plan.returncode == 1
    for said in (agent.log.splitlines()[-1], plan.stderr):
        assert why in said
        assert remedy in said


def test_a_set_cannot_be_destroyed_under_a_rule_of_an_owned_table(netns: Namespace, tmp_path: Path) -> None:
    netns.shell("ipset create blocked hash:net; ipset add blocked 127.0.1.0/24; ipset create other hash:net")
    agent = Agent(netns, tmp_path, f"{TEXT.replace('BACKEND', 'owned')}set = 'blocked'\n").ready()
    assert "in use by a kernel component" in netns.run("ipset", "destroy", "blocked", check=False).stderr
    # The name stays with the rule when the contents are exchanged.
    netns.shell("ipset swap blocked other")
    netns.call(send, "127.0.0.1", "127.0.1.1")
    assert agent.totals()["received"] == 0
    assert "Nothing to do" in agent.verb("plan").stdout
    assert agent.stop() == 0
    netns.shell("ipset destroy blocked")
