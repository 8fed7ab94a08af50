"""`accept_input`: rules of ours accept what is redirected to a proxy in front of a firewall that drops in hook INPUT."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from agent import Agent, until
from namespace import Namespace
from tcp_client import server

from nfq_agent.service import control

pytestmark = pytest.mark.kernel

Hosts = tuple[Namespace, Namespace, Namespace]

CONFIG = """
[agent]
backend = "{backend}"
[proxy.web]
listen = ["0.0.0.0:15002", "[::]:15002"]
{more}
[rules.web]
proxy = "web"
hooks = ["prerouting"]
tcp_ports = [8080]
"""
ACCEPT = "accept_input = true"
# What a host needs to be a host: its own loopback, and the neighbour discovery of IPv6. Nothing accepts what is established.
FIREWALLS = {
    "legacy": "for t in iptables ip6tables; do $t-legacy -w -P INPUT DROP; $t-legacy -w -A INPUT -i lo -j ACCEPT; done;"
    "ip6tables-legacy -w -A INPUT -p icmpv6 -j ACCEPT",
    "iptables-nft": "for t in iptables ip6tables; do $t-nft -P INPUT DROP; $t-nft -A INPUT -i lo -j ACCEPT; done;"
    "ip6tables-nft -A INPUT -p icmpv6 -j ACCEPT",
    "native": "nft add table inet theirs; nft 'add chain inet theirs in { type filter hook input priority 0; policy drop; }';"
    "nft add rule inet theirs in iif lo accept; nft add rule inet theirs in meta l4proto icmpv6 accept",
}


def answers(client: Namespace, port: int = 8080, host: str = "10.1.0.1") -> bool:
    """Whether a server of the host answers a client elsewhere within a second."""

    def exchange() -> bool:
        try:
            with socket.create_connection((host, port), 1) as connection:
                connection.sendall(b"hello")
                connection.shutdown(socket.SHUT_WR)
                return connection.recv(16) == b"hello"
        except OSError:
            return False

    return bool(client.call(exchange))


def everything(host: Namespace) -> str:
    """All rules of others and ours, of all kinds, in which nothing counts."""
    host.run("iptables-legacy", "-w", "-Z")
    lines = host.shell(
        "iptables-legacy-save; ip6tables-legacy-save; iptables-nft-save; ip6tables-nft-save; nft -s list ruleset inet"
    ).splitlines()
    return "\n".join(line.partition(" [")[0] for line in lines if not line.startswith("#"))


def foreign(host: Namespace) -> list[str]:
    """The rules and policies of others."""
    return [each for each in everything(host).splitlines() if "nfq-agent" not in each and ("-A " in each or " DROP" in each)]


def reload(agent: Agent, text: str) -> None:
    """Change to another configuration."""
    agent.configure(text)
    answer = agent.namespace.call(control.ask, agent.instance, {"verb": "reload"}, 60.0)
    assert answer["ok"], answer


@pytest.mark.parametrize(
    ("firewall", "backend"),
    [("legacy", "legacy"), ("legacy", "owned"), ("iptables-nft", "legacy"), ("iptables-nft", "owned"), ("native", "owned")],
)
def test_what_is_led_to_a_proxy_is_let_in(routed: Hosts, tmp_path: Path, firewall: str, backend: str) -> None:
    client, host, _ = routed
    host.shell(FIREWALLS[firewall])
    server(host, "echo", "::", 8080)
    before = foreign(host)
    agent = Agent(host, tmp_path, CONFIG.format(backend=backend, more="")).ready()
    assert "accept_input = true in table proxy.web" in agent.log
    assert not answers(client)
    reload(agent, CONFIG.format(backend=backend, more=ACCEPT))
    assert answers(client)
    assert answers(client, host="fd01::1")
    # Neither the proxy's own port nor another is opened.
    assert not answers(client, 15002)
    assert foreign(host) == before
    # It comes back when the firewall takes it away, and goes with the key.
    if firewall != "legacy":
        host.shell("nft flush ruleset;" + FIREWALLS[firewall])
        until(lambda: answers(client), "it is accepted again")
    reload(agent, CONFIG.format(backend=backend, more=""))
    assert "accept.web" not in everything(host)
    reload(agent, CONFIG.format(backend=backend, more=ACCEPT))
    assert answers(client)
    assert agent.stop() == 0
    assert "nfq-agent" not in everything(host)
    assert foreign(host) == before


def test_what_a_dead_agent_left_is_removed(routed: Hosts, tmp_path: Path) -> None:
    _, host, _ = routed
    host.shell(FIREWALLS["iptables-nft"] + ";" + FIREWALLS["native"])
    agent = Agent(host, tmp_path, CONFIG.format(backend="owned", more=ACCEPT)).ready()
    assert everything(host).count("accept.web") == 3
    shown = agent.verb("rules").stdout
    assert shown.count('--ctstate DNAT -m comment --comment "nfq-agent:default:accept.web" -j ACCEPT') == 3
    agent.kill()
    agent.verb("remove")
    assert "nfq-agent" not in everything(host)


@pytest.mark.parametrize("backend", ["legacy", "owned"])
def test_tproxy(routed: Hosts, tmp_path: Path, backend: str) -> None:
    client, host, target = routed
    host.shell(FIREWALLS["iptables-nft"])
    server(target, "echo")
    text = CONFIG.format(backend=backend, more='capture = "tproxy"')
    agent = Agent(host, tmp_path, text).ready()
    assert "iptables -I INPUT -p tcp -m mark --mark 0x800/0x800 -j ACCEPT" in agent.log
    assert not answers(client, host="10.2.0.2")
    reload(agent, text.replace("[rules.web]", f"{ACCEPT}\n[rules.web]"))
    # The answers of the server arrive in INPUT too, and are the firewall's business.
    host.run("iptables-nft", "-A", "INPUT", "-m", "conntrack", "--ctstate", "ESTABLISHED", "-j", "ACCEPT")
    assert answers(client, host="10.2.0.2")
    assert agent.stop() == 0
    assert "nfq-agent" not in everything(host)
