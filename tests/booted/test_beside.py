"""The service beside the programs that write rules on hosts: theirs stay exact, ours come back, and what passed is told.

Several neighbours live on one booted host in turn: their order is that of the tests' lines.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from booted.container import Container, Layer
from booted.nspawn import until
from booted.packages import Packages
from booted.peers import comes_back, exchange, ours, saved, status
from booted.roots import neighbours_root

_RULE = re.compile(r"-p tcp -m multiport --ports 11000")
_NEIGHBOURS = ("busybox-static", "docker.io", "fail2ban", "firewalld", "nftables", "ufw")
# Debian 12 has Docker's client in docker.io.
_BESIDES = {"trixie": ("docker-cli",)}
# A proxy for what comes from elsewhere to port 8080, beside the baseline's queue.
_PROXY = """[proxy.web]
listen = ["0.0.0.0:15002", "[::]:15002"]
[rules.web]
proxy = "web"
tcp_ports = [8080]
hooks = ["prerouting"]
"""
# A network namespace for a peer: what it sends arrives by an interface, as from another host.
_FAR = """
ip netns add far
ip link add near type veth peer name far netns far
ip address add 10.9.0.1/24 dev near; ip link set near up
ip -n far address add 10.9.0.2/24 dev far
ip -n far link set far up
ip -n far link set lo up
"""


def _made(built: Packages, *neighbours: str) -> Iterator[tuple[Path, ...]]:
    """The layers of a host of a release with neighbours and the package installed."""
    base = neighbours_root(built.release, *neighbours)
    deb = built.deb
    with Layer(base) as layer:
        shutil.copy(deb, layer.root / "root")
        with Container(layer) as host:
            host.run("apt-get", "install", "-y", f"/root/{deb.name}", timeout=300)
            host.power_off()
        layer.detach()
        yield layer.changes, base


@pytest.fixture(scope="module")
def neighboured(built: Packages) -> Iterator[tuple[Path, ...]]:
    yield from _made(built, *_NEIGHBOURS, *_BESIDES.get(built.release.name, ()))


@pytest.fixture(scope="module")
def persistent(built: Packages) -> Iterator[tuple[Path, ...]]:
    yield from _made(built, "iptables-persistent", "nftables")


@pytest.fixture
def beside(neighboured: tuple[Path, ...]) -> Iterator[Container]:
    """A fresh boot of it, with a peer that is not on this host."""
    with Layer(*neighboured) as layer, Container(layer) as container:
        serving(container)
        container.shell(_FAR)
        yield container


def serving(host: Container) -> None:
    until(lambda: host.show("nfq-agent", "ActiveState") == "active", "nfq-agent is active", 60)


def configure(host: Container, text: str) -> None:
    """The unit may not speak IP by itself; a proxy has to."""
    host.write("/etc/systemd/system/nfq-agent.service.d/ip.conf", "[Service]\nIPAddressDeny=\n")
    host.write("/etc/nfq-agent/conf.d/beside.toml", text)
    host.run("systemctl", "daemon-reload")
    host.run("systemctl", "restart", "nfq-agent")


def foreign(host: Container) -> str:
    """The rules of others. Tables are in the order in which they became present; one that is empty may be so because of us."""
    lines = saved(host).splitlines()
    tables = ["\n".join(table) for table in _tables(line for line in lines if "NFQA-" not in line and "nfq-agent:" not in line)]
    return "\n".join(sorted(table for table in tables if re.search("^(-A|:.* (DROP|-) )", table, re.MULTILINE)))


def _tables(lines: Iterable[str]) -> Iterator[list[str]]:
    table: list[str] = []
    for line in lines:
        if line.startswith("*") and table:
            yield table
            table = []
        table.append(line)
    yield table


def whole(host: Container, seconds: float = 15) -> None:
    """Wait until all rules of the baseline are in the kernel."""
    until(lambda: len([line for line in ours(host) if _RULE.search(line)]) == 4, "our rules are back", seconds)


def log(host: Container) -> str:
    return host.journal("--unit=nfq-agent", "--boot")


def bypass(host: Container, cause: str) -> dict[str, Any]:
    """The entry of the status for a cause; empty without one."""
    return next((dict(each) for each in status(host)["bypasses"] if each["cause"] == cause), {})


def judged(host: Container) -> None:
    """Traffic gets verdicts."""
    before = status(host)["queues"][0]["workers"][0]["received"]
    exchange(host, size=1000)
    assert status(host)["queues"][0]["workers"][0]["received"] > before


def connections(host: Container) -> int:
    """That the proxy has taken so far."""
    return int(status(host)["proxies"][0]["counters"]["connections"])


# argv: how many requests, and the port. Prints how many are answered with an ELF file.
_FETCH = """
import sys, urllib.request
good = 0
for _ in range(int(sys.argv[1])):
    try:
        with urllib.request.urlopen(f"http://10.9.0.1:{sys.argv[2]}/bin/busybox", timeout=1) as answer:
            good += answer.read(4) == b"\\x7fELF"
    except OSError:
        pass
print(good)
"""


def fetch(host: Container, count: int = 1, port: int = 8080) -> int:
    """How many requests of the peer elsewhere are answered."""
    words = ("nsenter", "--net=/run/netns/far", "python3", "-c", _FETCH, str(count), str(port))
    return int(host.run(*words, timeout=120).stdout)


def taken(host: Container) -> None:
    """Each of five requests is answered, through the proxy."""
    before = connections(host)
    assert fetch(host, 5) == 5
    assert connections(host) == before + 5


def active_since(host: Container, unit: str) -> float:
    """When a unit became active, in seconds of the host's monotonic clock."""
    return int(host.show(unit, "ActiveEnterTimestampMonotonic")) / 1e6


_WEB = """[Service]
ExecStart=/usr/bin/busybox httpd -f -p 8080 -h /usr
[Install]
WantedBy=multi-user.target
"""


def web_server(host: Container) -> None:
    """One of the host itself on port 8080."""
    host.run("systemd-run", "--unit=web", "busybox", "httpd", "-f", "-p", "8080", "-h", "/usr")
    until(lambda: ":8080" in host.run("ss", "-ltn").stdout, "it listens")


def test_docker(beside: Container) -> None:
    host = beside
    configure(host, _PROXY)
    assert status(host)["backend"] == "legacy"
    host.run("systemctl", "start", "docker", timeout=120)
    host.shell("mkdir -p /t/bin && cp /bin/busybox /t/bin/ && tar -C /t -c . | docker import - bb", timeout=120)
    host.run("docker", "run", "-d", "--restart=always", "--name=web", "-p", "8080:80", "bb", "/bin/busybox", "httpd", "-f", "-p",
             "80", "-h", "/", timeout=120)  # fmt: skip
    rules = foreign(host)
    assert "-j DNAT --to-destination" in rules
    # Docker's NAT was registered later than ours, so it is asked first: said, with the number and the remedy.
    assert fetch(host, 30) == 30
    assert connections(host) == 0
    missing = bypass(host, "proxy")
    assert (missing["count"], missing["unit"]) == (30, "connections")
    assert 'backend = "owned"' in missing["advice"]
    until(lambda: "traffic passed uninspected: 30 connections" in log(host), "it is in the log", 30)
    # From the next start on the backend is chosen that is asked before it.
    host.run("systemctl", "restart", "nfq-agent")
    assert status(host)["backend"] == "owned"
    assert "nf_tables does NAT here" in log(host)
    assert fetch(host, 5) == 5
    assert connections(host) == 5
    assert foreign(host) == rules
    # Docker ends, in order and not, and comes back.
    ends = "systemctl reset-failed docker; systemctl restart docker"
    for command in (ends, "kill -9 $(pidof dockerd)", f"nft flush ruleset; {ends}"):
        comes_back(host, "docker", command)
        until(lambda: fetch(host, 1) == 1, "the published port answers", 60)
        taken(host)
        judged(host)
    host.run("systemctl", "stop", "nfq-agent")
    assert ours(host) == []
    assert "nfq-agent" not in host.run("nft", "list", "ruleset").stdout
    assert fetch(host, 1) == 1


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
    until(lambda: host.show("docker", "ActiveState") == "active", "docker is active", 120)
    since = [int(host.show(unit, "ActiveEnterTimestampMonotonic")) for unit in (first, second)]
    assert since[0] < since[1]
    host.shell(_FAR)
    until(lambda: fetch(host, 1) == 1, "the published port answers", 120)


def test_boot_with_docker_in_both_orders(neighboured: tuple[Path, ...]) -> None:
    with Layer(*neighboured) as layer:
        with Container(layer) as host:
            serving(host)
            configure(host, _PROXY)
            # As where a network service wants network.target, which no unit of this host does: Docker then comes after the agent.
            host.write("/etc/systemd/system/docker.service.d/order.conf", "[Unit]\nAfter=nfq-agent.service\n")
            host.run("systemctl", "enable", "--now", "docker", timeout=120)
            host.shell("mkdir -p /t/bin && cp /bin/busybox /t/bin/ && tar -C /t -c . | docker import - bb", timeout=120)
            host.run("docker", "run", "-d", "--restart=always", "--name=web", "-p", "8080:80", "bb", "/bin/busybox", "httpd",
                     "-f", "-p", "80", "-h", "/", timeout=120)  # fmt: skip
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
            until(lambda: "traffic passed uninspected" in log(host), "it is in the log", 90)
            assert foreign(host) == rules
            host.write("/etc/nfq-agent/conf.d/beside.toml", f'[agent]\nbackend = "owned"\n{_PROXY}')
            host.power_off()
        with Container(layer) as host:
            # As advised: now all are taken, in the same order.
            booted_beside_docker(host, "nfq-agent", "docker")
            taken(host)
            host.write("/etc/nfq-agent/conf.d/beside.toml", _PROXY)
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
)


def test_the_first_seconds_of_a_boot(neighboured: tuple[Path, ...]) -> None:
    """On a clock of its own, beside nftables, Docker, fail2ban and a holder of the lock that start in the same boot."""
    with Layer(*neighboured) as layer:
        with Container(layer) as host:
            serving(host)
            configure(host, _PROXY.replace("[rules.web]", "accept_input = true\n[rules.web]"))
            host.write("/etc/nftables.conf", _NFT)
            host.write("/etc/systemd/system/holder.service", _HOLDER)
            host.write("/etc/systemd/system/web.service", _WEB)
            host.shell("systemctl enable nftables docker fail2ban holder web", timeout=120)
            host.power_off()
        with Container(layer, own_clock=True) as host:
            serving(host)
            ready = active_since(host, "nfq-agent")
            assert active_since(host, "nftables") < ready < 30
            assert ready <= active_since(host, "network-pre.target")
            whole(host)
            judged(host)
            until(lambda: host.show("docker", "ActiveState") == "active", "docker is active", 120)
            assert ready < active_since(host, "docker")
            host.shell(_FAR)
            until(lambda: fetch(host, 1) == 1, "the server answers through the firewall", 30)
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


def test_ufw(beside: Container) -> None:
    host = beside
    web_server(host)
    host.shell("ufw --force enable; ufw allow in proto tcp to any port 8080")
    # What ufw writes when it is enabled again differs from the first time, without us.
    host.shell("ufw reload; ufw disable; ufw --force enable")
    rules = foreign(host)
    assert fetch(host, 1) == 1
    configure(host, _PROXY)
    whole(host)
    # What is redirected to the proxy has its port by then, which ufw does not let in.
    assert fetch(host, 2) == 0
    assert "drops what it does not accept" in log(host)
    doctor = host.run("nfq-agent", "doctor", check=False).stdout
    line = "-p tcp -m multiport --dports 15002 -m conntrack --ctstate DNAT -j ACCEPT"
    assert line in " ".join(doctor.split())
    host.shell(f"iptables -I INPUT {line}")
    before = connections(host)
    assert fetch(host, 3) == 3
    assert connections(host) == before + 3
    host.shell(f"iptables -D INPUT {line}")
    assert fetch(host, 1) == 0
    # Where the administrator allows it, the agent puts such a line there, and ufw works as before.
    host.write("/etc/nfq-agent/conf.d/beside.toml", _PROXY.replace("[rules.web]", "accept_input = true\n[rules.web]"))
    host.run("systemctl", "reload", "nfq-agent")
    before = connections(host)
    assert fetch(host, 3) == 3
    assert connections(host) == before + 3
    assert "accept.web" in host.run("iptables-nft", "-S", "INPUT").stdout
    for command in ("reload", "disable", "--force enable"):
        host.shell(f"ufw {command}")
        whole(host)
        judged(host)
        until(lambda: fetch(host, 1) == 1, "what is redirected to the proxy is accepted", 15)
    assert foreign(host) == rules
    host.run("systemctl", "stop", "nfq-agent")
    assert foreign(host) == rules
    assert fetch(host, 1) == 1


@pytest.mark.parametrize("backend", ["nftables", "iptables"])
def test_firewalld(beside: Container, backend: str) -> None:
    host = beside
    host.shell(f"sed -i 's/^FirewallBackend=.*/FirewallBackend={backend}/' /etc/firewalld/firewalld.conf")
    host.run("systemctl", "start", "firewalld", timeout=120)
    host.shell("firewall-cmd --add-port=8080/tcp --permanent; firewall-cmd --reload", timeout=120)
    whole(host)
    rules = foreign(host)
    repairs = status(host)["drift"]["repairs"]
    for _ in range(2):
        host.run("firewall-cmd", "--reload", timeout=120)
        whole(host)
        judged(host)
    found = status(host)["drift"]
    if found["repairs"] > repairs:
        assert "another program changed this agent's rules" in log(host)
        assert 0 < found["away"] < 30
    assert foreign(host) == rules
    host.run("systemctl", "stop", "nfq-agent")
    assert ours(host) == []
    assert foreign(host) == rules


def test_fail2ban_and_those_that_flush_and_restore(beside: Container) -> None:
    host = beside
    host.write("/etc/fail2ban/filter.d/probe.conf", "[Definition]\nfailregex = ^<HOST> failed$\n")
    host.write(
        "/etc/fail2ban/jail.d/probe.conf",
        "[sshd]\nenabled = false\n[probe]\nenabled = true\nbackend = polling\nlogpath = /var/log/probe\nfilter = probe\n"
        "port = 22\nbanaction = iptables-multiport\n",
    )
    host.shell("touch /var/log/probe; systemctl start fail2ban", timeout=60)
    until(lambda: "probe" in host.run("fail2ban-client", "status", check=False).stdout, "the jail is there", 30)
    for number in range(1, 21):
        host.run("fail2ban-client", "set", "probe", "banip", f"192.0.2.{number}")
        if number % 5 == 0:
            # Meanwhile ours are flushed, and written again.
            host.run("iptables-legacy", "-w", "-t", "mangle", "-F")
    until(lambda: foreign(host).count("192.0.2.") == 20, "all are banned", 30)
    whole(host)
    rules = foreign(host)
    # Both kinds side by side; the one that is flushed takes nothing of ours with it.
    host.shell("iptables-legacy -w -A INPUT -s 198.51.100.7 -j DROP; iptables-nft -A INPUT -s 198.51.100.8 -j DROP")
    host.run("nft", "flush", "ruleset")
    whole(host)
    judged(host)
    # A full restore every 3 s, of what was there before the agent.
    full = "*mangle\n:PREROUTING ACCEPT\n:INPUT ACCEPT\n:FORWARD ACCEPT\n:OUTPUT ACCEPT\n:POSTROUTING ACCEPT\nCOMMIT\n"
    before = status(host)["drift"]
    for _ in range(3):
        began = time.monotonic()
        host.run("iptables-legacy-restore", "--wait", input=full)
        whole(host)
        judged(host)
        time.sleep(max(0.0, 3 - (time.monotonic() - began)))
    found = status(host)["drift"]
    assert found["repairs"] == before["repairs"] + 3
    assert found["pause"] == found["check"]
    assert bypass(host, "rules-away")["count"] > 0
    assert "rules were not in force" in log(host)
    host.run("systemctl", "stop", "nfq-agent")
    assert ours(host) == []
    assert "198.51.100.7" in foreign(host)
    assert "192.0.2.20" in rules


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
            until(lambda: host.show("netfilter-persistent", "ActiveState") == "active", "the saved rules are restored", 30)
            whole(host)
            judged(host)
            assert len([line for line in ours(host) if line.startswith("-A")]) == 8
            assert foreign(host) == rules
            host.run("systemctl", "stop", "nfq-agent")
            assert ours(host) == []
            assert foreign(host) == rules
