"""Stops under a flood lose no packet: rules go, the queue runs empty, then it is unbound. Foreign rules count the packets."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest
from agent import Agent, ours, suspend
from agent_flood import flood, udp
from namespace import Namespace

pytestmark = pytest.mark.kernel

# In raw: before our rules on the way out, and where the packets arrive.
COUNT = """
iptables-legacy -t raw -A OUTPUT -p udp --dport 11000 -m comment --comment sent
iptables-legacy -t raw -A PREROUTING -p udp --dport 11000 -m comment --comment arrived -j DROP
"""


def counted(namespace: Namespace) -> tuple[int, int]:
    """What arrived and what was sent so far."""
    text = namespace.shell("iptables-legacy -t raw -nvxL")
    found = {word: int(number) for number, word in re.findall(r"^ *(\d+) .*/\* (sent|arrived) \*/", text, re.MULTILINE)}
    return found["arrived"], found["sent"]


@pytest.mark.parametrize("backend", ["legacy", "owned"])
def test_starts_and_stops_under_a_flood_lose_no_packet(netns: Namespace, tmp_path: Path, backend: str) -> None:
    netns.shell(COUNT)
    sender = flood(netns, 10_000_000, 20_000)
    agent = None
    for _ in range(3):
        if agent is None:
            agent = Agent(netns, tmp_path, f'[agent]\nbackend = "{backend}"\n' + udp(max_len=16384, fail_open=False))
        else:
            agent.start()
        agent.ready()
        time.sleep(0.05)
        assert agent.stop() == 0
        assert ours(netns) == []
        # What is on its way arrives while nothing more is sent.
        suspend(sender.pid)
        arrived, sent = counted(netns)
        assert arrived == sent > 0
        sender.send_signal(signal.SIGCONT)
    sender.kill()
