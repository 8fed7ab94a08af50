"""The service in the boot of a host whose other programs write rules too: order, the first seconds, rules that are restored."""

from __future__ import annotations

import re
from pathlib import Path

from booted.beside import (
    FAR,
    PROXY,
    WEB,
    active_since,
    bypass,
    configure,
    connections,
    fetch,
    foreign,
    judged,
    log,
    serving,
    taken,
    whole,
)
from booted.container import Container, Layer
from booted.nspawn import until
from booted.peers import ours, status

# Starts the agent when Docker is there: its own unit comes before the network.
_LATE = """[Unit]
After=docker.service
[Service]
Type=oneshot
ExecStart=/bin/systemctl start nfq-agent
[Install]
WantedBy=multi-user.target
"""


def booted_beside_docker(host: Container, first: str, second: str) -> None:
    """Wait until both are up and a published port answers. first: the unit that was up before `second`."""
    serving(host)
    until(lambda: host.show("docker", "ActiveState") == "active", "docker is active")
    since = [int(host.show(unit, "ActiveEnterTimestampMonotonic")) for unit in (first, second)]
    assert since[0] < since[1]
    host.shell(FAR)
    until(lambda: fetch(host, 1) == 1, "the published port answers")


def test_boot_with_docker_in_both_orders(neighboured: tuple[Path, ...]) -> None:
    with Layer(*neighboured) as layer:
        with Container(layer) as host:
            serving(host)
            configure(host, PROXY)
            # As where a network service wants network.target, which no unit of this host does: Docker then comes after the agent.
            host.write("/etc/systemd/system/docker.service.d/order.conf", "[Unit]\nAfter=nfq-agent.service\n")
            host.run("systemctl", "enable", "--now", "docker")
            host.shell("mkdir -p /t/bin && cp /bin/busybox /t/bin/ && tar -C /t -c . | docker import - bb")
            host.run("docker", "run", "-d", "--restart=always", "--name=web", "-p", "8080:80", "bb", "/bin/busybox", "httpd",
                     "-f", "-p", "80", "-h", "/")  # fmt: skip
            host.power_off()
        with Container(layer) as host:
            # The agent comes first, as its unit says. Its legacy NAT is asked second: what it misses is counted and told.
            booted_beside_docker(host, "nfq-agent", "docker")
            rules = foreign(host)
            assert "-j DNAT --to-destination" in rules
            assert fetch(host, 30) == 30
            assert connections(host) == 0
            assert bypass(host, "proxy")["count"] >= 30
            assert "NAT order" in host.run("nfq-agent", "doctor", check=False).stdout
            until(lambda: "traffic passed uninspected" in log(host), "it is in the log")
            assert foreign(host) == rules
            host.write("/etc/nfq-agent/conf.d/beside.toml", f'[agent]\nbackend = "owned"\n{PROXY}')
            host.power_off()
        with Container(layer) as host:
            # As advised: now all are taken, in the same order.
            booted_beside_docker(host, "nfq-agent", "docker")
            taken(host)
            host.write("/etc/nfq-agent/conf.d/beside.toml", PROXY)
            host.write("/etc/systemd/system/late.service", _LATE)
            host.shell("rm -r /etc/systemd/system/docker.service.d; systemctl disable nfq-agent; systemctl enable late")
            host.power_off()
        with Container(layer) as host:
            # Docker comes first: the backend is chosen that is asked before it.
            booted_beside_docker(host, "docker", "nfq-agent")
            assert status(host)["backend"] == "owned"
            assert "nf_tables does NAT here" in log(host)
            rules = foreign(host)
            taken(host)
            judged(host)
            host.run("systemctl", "stop", "nfq-agent")
            assert foreign(host) == rules
            assert fetch(host, 1) == 1


# A firewall as Debian's example, for a host with a server; it drops by its policy.
_NFT = """#!/usr/sbin/nft -f
flush ruleset
table inet firewall {
    chain input {
        type filter hook input priority 0; policy drop;
        iif lo accept
        ct state established,related accept
        tcp dport { 22, 8080 } accept
        meta l4proto icmpv6 accept
    }
}
"""
# Another program that works with the tables while the agent starts.
_HOLDER = """[Unit]
DefaultDependencies=no
Before=nfq-agent.service
After=nfq-agent-rules.service
[Service]
Type=exec
ExecStart=/usr/bin/flock --close /run/xtables.lock /usr/bin/sleep 2
[Install]
WantedBy=sysinit.target
"""
# All that the agent has to say in such a boot.
_SAID = (
    r"created the system user proxyuser \(uid \d+\)",
    r"instance default is serving queue 100, proxy web on 0.0.0.0:15002, \[::\]:15002: \d+ legacy rules are in",
    r"rules that accept what is redirected to a proxy, at the head of chains that drop in hook INPUT \(foreign nf_tables\): "
    r"\d inserted, 0 removed \(accept_input\)",
    # Where the container may open fewer files than the unit asks for.
    r"proxy web: \d+ descriptors are enough for \d+ connections, not for 10000; raise LimitNOFILE= or lower max_connections",
)


def test_the_first_seconds_of_a_boot(neighboured: tuple[Path, ...]) -> None:
    """On a clock of its own, beside nftables, Docker, fail2ban and a holder of the lock that start in the same boot."""
    with Layer(*neighboured) as layer:
        with Container(layer) as host:
            serving(host)
            configure(host, PROXY.replace("[rules.web]", "accept_input = true\n[rules.web]"))
            host.write("/etc/nftables.conf", _NFT)
            host.write("/etc/systemd/system/holder.service", _HOLDER)
            # As where a network service wants network.target. Without the order `auto` chooses by what Docker has done so far.
            host.write("/etc/systemd/system/docker.service.d/order.conf", "[Unit]\nAfter=nfq-agent.service\n")
            host.write("/etc/systemd/system/web.service", WEB)
            host.shell("systemctl enable nftables docker fail2ban holder web")
            host.power_off()
        with Container(layer, own_clock=True) as host:
            serving(host)
            ready = active_since(host, "nfq-agent")
            assert active_since(host, "nftables") < ready < 30
            assert ready <= active_since(host, "network-pre.target")
            whole(host)
            judged(host)
            until(lambda: host.show("docker", "ActiveState") == "active", "docker is active")
            assert ready < active_since(host, "docker")
            host.shell(FAR)
            until(lambda: fetch(host, 1) == 1, "the server answers through the firewall")
            taken(host)
            rules = foreign(host)
            assert "table inet firewall" in host.run("nft", "list", "tables").stdout
            # Each line is one sentence, and none is of another kind.
            lines = host.journal("--unit=nfq-agent", "--boot", "--output=cat", "_COMM=nfq-agent").splitlines()
            assert [line for line in lines if not any(re.fullmatch(known, line) for known in _SAID)] == []
            assert sum("is serving" in line for line in lines) == 1
            assert host.show("nfq-agent", "NRestarts") == "0"
            host.run("systemctl", "stop", "nfq-agent")
            assert ours(host) == []
            assert foreign(host) == rules
            assert fetch(host, 1) == 1


def test_netfilter_persistent(persistent: tuple[Path, ...]) -> None:
    with Layer(*persistent) as layer:
        with Container(layer) as host:
            serving(host)
            host.shell("update-alternatives --set iptables /usr/sbin/iptables-legacy")
            host.shell("update-alternatives --set ip6tables /usr/sbin/ip6tables-legacy")
            host.shell(
                "iptables -w -A INPUT -s 198.51.100.7 -j DROP; netfilter-persistent save; systemctl enable netfilter-persistent"
            )
            assert "NFQA-default-INPUT" in host.shell("cat /etc/iptables/rules.v4")
            rules = foreign(host)
            assert "/etc/iptables/rules.v4 holds rules of nfq-agent" in " ".join(
                host.run("nfq-agent", "doctor", check=False).stdout.split()
            )
            host.power_off()
        with Container(layer) as host:
            serving(host)
            until(lambda: host.show("netfilter-persistent", "ActiveState") == "active", "the saved rules are restored")
            whole(host)
            judged(host)
            assert len([line for line in ours(host) if line.startswith("-A")]) == 8
            assert foreign(host) == rules
            host.run("systemctl", "stop", "nfq-agent")
            assert ours(host) == []
            assert foreign(host) == rules
