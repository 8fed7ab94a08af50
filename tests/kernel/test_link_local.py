"""An allow-list over `all = true` leaves the IPv6 link alive."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from agent import Agent, until
from captures import listening
from namespace import Namespace

pytestmark = pytest.mark.kernel
CONFIG = """
[queue.q]
num = 9
elements = ["allow"]
[element.allow]
type = "policy"
default = "drop"
rule = [{ action = "accept", protocol = "tcp", dport = 8080 }, { action = "accept", protocol = "tcp", sport = 8080 }]
[rules.r]
queue = "q"
all = true
"""


def test_an_allow_list_over_everything_leaves_the_link_alive(pair: tuple[Namespace, Namespace], tmp_path: Path) -> None:
    server, client = pair
    agent = Agent(client, tmp_path, CONFIG).ready()
    for port in (8080, 8081):
        server.start("nc", "-6", "-lk", str(port))
        until(partial(listening, server, port), f"port {port} is served")
    for namespace in pair:
        namespace.run("ip", "-6", "neigh", "flush", "all")
    client.run("nc", "-6", "-z", "-w", "60", "fd00:203::1", "8080")
    assert client.run("nc", "-6", "-z", "-w", "1", "fd00:203::1", "8081", check=False).returncode != 0
    assert agent.stop() == 0
