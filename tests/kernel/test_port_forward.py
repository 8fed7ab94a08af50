"""A port forward of others, in PREROUTING alone as LXC and routers write it, beside a proxy of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from agent import Agent
from namespace import Namespace
from tcp_client import ask, server

from nfq_agent.service import control

pytestmark = pytest.mark.kernel

Hosts = tuple[Namespace, Namespace, Namespace]
FORWARDS = {
    "legacy": "iptables-legacy -w -t nat -A {} -d 10.1.0.1 -p tcp --dport 8080 -j DNAT --to-destination 10.2.0.2:8080",
    "nft": "iptables-nft -t nat -A {} -d 10.1.0.1 -p tcp --dport 8080 -j DNAT --to-destination 10.2.0.2:8080",
}
CONFIG = """
[agent]
backend = "{backend}"
[proxy.web]
listen = ["0.0.0.0:15002"]
{more}
[rules.web]
proxy = "web"
family = "inet"
hooks = ["prerouting"]
tcp_ports = [{port}]
"""


def counters(agent: Agent) -> dict[str, Any]:
    return dict(agent.answer()["proxies"][0]["counters"])


def forwarded(client: Namespace) -> bool:
    try:
        return bool(client.call(ask, "10.1.0.1", 8080) == b"hello")
    except OSError:
        return False


@pytest.mark.parametrize("backend", ["legacy", "owned"])
@pytest.mark.parametrize("kind", FORWARDS)
def test_a_forward_works_beside_us(routed: Hosts, tmp_path: Path, kind: str, backend: str) -> None:
    client, host, target = routed
    server(target, "echo")
    server(host, "echo", "10.1.0.1", 9090)
    host.shell(FORWARDS[kind].format("PREROUTING"))
    # One that the rules do not select, or that is excluded, is the forward's; ours are the proxy's.
    agent = Agent(host, tmp_path, CONFIG.format(backend=backend, more="", port=9090)).ready()
    assert forwarded(client)
    assert client.call(ask, "10.1.0.1", 9090) == b"hello"
    assert counters(agent)["connections"] == 1
    agent.configure(CONFIG.format(backend=backend, more='exclude = ["10.1.0.1/32"]', port=8080))
    assert host.call(control.ask, "default", {"verb": "reload"}, 60.0)["ok"]
    assert forwarded(client)
    assert counters(agent)["connections"] <= 1
    assert agent.stop() == 0
    assert forwarded(client)


def test_one_that_both_select_passes_the_proxy_where_output_is_forwarded_too(routed: Hosts, tmp_path: Path) -> None:
    client, host, target = routed
    server(target, "echo")
    host.shell(FORWARDS["nft"].format("PREROUTING"))
    agent = Agent(host, tmp_path, CONFIG.format(backend="owned", more="", port=8080)).ready()
    # The proxy's own connection passes OUTPUT, where this forward has no rule.
    assert not forwarded(client)
    assert counters(agent)["failed_upstream"] == 1
    host.shell(FORWARDS["nft"].format("OUTPUT"))
    assert forwarded(client)
    assert counters(agent)["connections"] == 2
    assert agent.stop() == 0
    assert forwarded(client)
