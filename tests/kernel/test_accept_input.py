"""`accept_input`: rules of ours accept what is redirected to a proxy in front of a firewall that drops in hook INPUT."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from agent import Agent, until
from namespace import PATIENCE, Namespace
from tcp_client import server

from nfq_agent.host.xtables import obstacles
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
    # No policy drops: the last rule of INPUT does, or that of the chain which it leads to.
    "legacy, by a rule": "for t in iptables ip6tables; do $t-legacy -w -A INPUT -i lo -j ACCEPT; done;"
    "ip6tables-legacy -w -A INPUT -p icmpv6 -j ACCEPT; ip6tables-legacy -w -A INPUT -j DROP;"
    "iptables-legacy -w -A INPUT -j REJECT",
    "native, by zones": "nft add table inet theirs; nft 'add chain inet theirs in { type filter hook input priority 10; }';"
    "nft add chain inet theirs zone; nft add rule inet theirs zone meta l4proto icmpv6 accept;"
    "nft add rule inet theirs zone drop; nft add rule inet theirs in iif lo accept;"
    "nft add rule inet theirs in 'iifname != lo' goto zone; nft add rule inet theirs in reject",
}


def native(family: str, rules: str, hook: str = "input") -> str:
    """The command that makes such a chain."""
    return f"nft 'table {family} t {{ chain c {{ type filter hook {hook} priority 10; {rules}; }}; }}'"


# Whether each is taken for a firewall that drops: what is redirected, and what arrives with the mark of TPROXY.
CHAINS = {
    "iptables-nft -A INPUT -s 192.0.2.1 -j DROP; iptables-legacy -w -A INPUT -p udp -j DROP": (False, False),
    "iptables-nft -A INPUT -m conntrack --ctstate INVALID -j DROP; iptables-nft -A INPUT -j LOG": (False, False),
    "iptables-nft -A INPUT -p tcp -j REJECT --reject-with tcp-reset": (True, True),
    "iptables-nft -A INPUT -m comment --comment all -i eth0 -j DROP": (True, True),
    "iptables-nft -N end; iptables-nft -A end -j DROP; iptables-nft -A INPUT -g end": (True, True),
    "ip6tables-nft -A INPUT -m conntrack --ctstate RELATED,DNAT -j ACCEPT; ip6tables-nft -P INPUT DROP": (False, True),
    "iptables-nft -P INPUT DROP; iptables-nft -A INPUT -j ACCEPT": (False, False),
    "iptables-legacy -w -A INPUT ! -i lo -p tcp -j DROP": (True, True),
    "iptables-legacy -w -N end; iptables-legacy -w -A end -j DROP; iptables-legacy -w -A INPUT -g end": (True, True),
    "iptables-legacy -w -A INPUT -m conntrack --ctstate DNAT -j ACCEPT; iptables-legacy -w -P INPUT DROP": (False, True),
    "ip6tables-legacy -w -A INPUT -p tcp -m comment --comment all -j DROP": (True, True),
    "ip6tables-legacy -w -A INPUT -s fd00::/8 -j DROP; ip6tables-legacy -w -A INPUT -p tcp --dport 22 -j DROP": (False, False),
    native("inet", "tcp dport 22 drop; ct state invalid drop; limit rate 1/second drop"): (False, False),
    native("inet", "ct status dnat accept; log; counter reject with icmpx admin-prohibited"): (False, True),
    native("ip", 'ip protocol tcp log prefix "x" counter drop'): (True, True),
    native("inet", "meta nfproto ipv6 drop"): (True, True),
    native("inet", "policy drop", "forward"): (False, False),
}


def answers(client: Namespace, port: int = 8080, host: str = "10.1.0.1", seconds: float = PATIENCE) -> bool:
    """Whether a server of the host answers a client elsewhere in this time."""

    def exchange() -> bool:
        try:
            with socket.create_connection((host, port), seconds) as connection:
                connection.sendall(b"hello")
                connection.shutdown(socket.SHUT_WR)
                return connection.recv(16) == b"hello"
        except OSError:
            return False

    return bool(client.call(exchange))


def silent(client: Namespace, port: int = 8080, host: str = "10.1.0.1") -> bool:
    """Whether no server of the host answers within a second."""
    return not answers(client, port, host, 1)


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
    [
        ("legacy", "legacy"),
        ("legacy", "owned"),
        ("iptables-nft", "legacy"),
        ("iptables-nft", "owned"),
        ("native", "owned"),
        ("legacy, by a rule", "legacy"),
        ("legacy, by a rule", "owned"),
        ("native, by zones", "legacy"),
    ],
)
def test_what_is_led_to_a_proxy_is_let_in(routed: Hosts, tmp_path: Path, firewall: str, backend: str) -> None:
    client, host, _ = routed
    host.shell(FIREWALLS[firewall])
    server(host, "echo", "::", 8080)
    before = foreign(host)
    agent = Agent(host, tmp_path, CONFIG.format(backend=backend, more="")).ready()
    assert "accept_input = true in table proxy.web" in agent.log
    assert silent(client)
    reload(agent, CONFIG.format(backend=backend, more=ACCEPT))
    # At once: an answer may come later, to a SYN that is sent again.
    assert "accept.web" in everything(host)
    assert answers(client)
    assert answers(client, host="fd01::1")
    # Neither the proxy's own port nor another is opened.
    assert silent(client, 15002)
    assert foreign(host) == before
    # It comes back when the firewall takes it away, and goes with the key.
    if not firewall.startswith("legacy"):
        host.shell("nft flush ruleset;" + FIREWALLS[firewall])
        until(lambda: answers(client, seconds=1), "it is accepted again")
    reload(agent, CONFIG.format(backend=backend, more=""))
    assert "accept.web" not in everything(host)
    reload(agent, CONFIG.format(backend=backend, more=ACCEPT))
    assert "accept.web" in everything(host)
    assert answers(client)
    assert agent.stop() == 0
    assert "nfq-agent" not in everything(host)
    assert foreign(host) == before


@pytest.mark.parametrize("text", CHAINS)
def test_which_chains_drop_what_they_do_not_accept(netns: Namespace, text: str) -> None:
    netns.shell(text)
    assert netns.call(lambda: tuple(bool(obstacles.firewalls(translated)) for translated in (True, False))) == CHAINS[text]


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
    assert silent(client, host="10.2.0.2")
    reload(agent, text.replace("[rules.web]", f"{ACCEPT}\n[rules.web]"))
    # The answers of the server arrive in INPUT too, and are the firewall's business.
    host.run("iptables-nft", "-A", "INPUT", "-m", "conntrack", "--ctstate", "ESTABLISHED", "-j", "ACCEPT")
    assert answers(client, host="10.2.0.2")
    assert agent.stop() == 0
    assert "nfq-agent" not in everything(host)
