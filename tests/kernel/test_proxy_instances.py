"""Two instances with proxies for the same traffic, each with a user of its own: a connection goes through one of them, once."""

from __future__ import annotations

from pathlib import Path

import pytest
from agent import Agent
from namespace import Namespace
from tcp_client import ask, server

pytestmark = pytest.mark.kernel

_TEXT = """
[agent]
instance = "{instance}"
user = "proxy{instance}"
backend = "{backend}"
[proxy.web]
listen = ["0.0.0.0:{port}", "[::]:{port}"]
capture = "{capture}"
[rules.web]
proxy = "web"
hooks = [{hooks}]
tcp_ports = [8080]
"""


def _connections(agent: Agent) -> tuple[int, int]:
    """How many it carried, and refused."""
    (proxy,) = agent.status()["proxies"]
    return proxy["counters"]["connections"], proxy["counters"]["refused"]


@pytest.mark.parametrize("backends", [("legacy", "legacy"), ("legacy", "owned")], ids="-".join)
@pytest.mark.parametrize("capture", ["redirect", "tproxy"])
def test_they_leave_each_other_alone(
    routed: tuple[Namespace, Namespace, Namespace], tmp_path: Path, capture: str, backends: tuple[str, str]
) -> None:
    client, host, _ = routed
    server(host, "echo", "10.1.0.1")
    # TPROXY has no hook for what this host sends itself.
    hooks = '"prerouting", "output"' if capture == "redirect" else '"prerouting"'
    agents = [
        Agent(
            host, tmp_path, _TEXT.format(instance=name, backend=backend, port=port, capture=capture, hooks=hooks), instance=name
        )
        for name, backend, port in zip("ab", backends, (15002, 15012), strict=True)
    ]
    for agent in agents:
        agent.ready()
    # From a remote host to an address of this one: what a proxy sends there comes back over lo.
    for _ in range(3):
        assert client.call(ask, "10.1.0.1", 8080) == b"hello"
    # And what this host sends itself.
    if capture == "redirect":
        assert host.call(ask, "10.1.0.1", 8080) == b"hello"
    found = [_connections(agent) for agent in agents]
    assert sum(carried for carried, _ in found) == (4 if capture == "redirect" else 3)
    assert [refused for _, refused in found] == [0, 0]
    for agent in agents:
        assert agent.stop() == 0
