"""The service beside the programs that write rules on hosts: theirs stay exact, ours come back, and what passed is told.

Several neighbours live on one booted host in turn: their order is that of the tests' lines.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from booted.beside import (
    FAR,
    PROXY,
    bypass,
    configure,
    connections,
    fetch,
    foreign,
    judged,
    log,
    serving,
    taken,
    web_server,
    whole,
)
from booted.container import Container, Layer
from booted.nspawn import until
from booted.peers import comes_back, ours, status


@pytest.fixture
def beside(neighboured: tuple[Path, ...]) -> Iterator[Container]:
    """A fresh boot of it, with a peer that is not on this host."""
    with Layer(*neighboured) as layer, Container(layer) as container:
        serving(container)
        container.shell(FAR)
        yield container


def test_docker(beside: Container) -> None:
    host = beside
    configure(host, PROXY)
    assert status(host)["backend"] == "legacy"
    host.run("systemctl", "start", "docker")
    host.shell("mkdir -p /t/bin && cp /bin/busybox /t/bin/ && tar -C /t -c . | docker import - bb")
    host.run("docker", "run", "-d", "--restart=always", "--name=web", "-p", "8080:80", "bb", "/bin/busybox", "httpd", "-f", "-p",
             "80", "-h", "/")  # fmt: skip
    rules = foreign(host)
    assert "-j DNAT --to-destination" in rules
    # Docker's NAT was registered later than ours, so it is asked first: said, with the number and the remedy.
    assert fetch(host, 30) == 30
    assert connections(host) == 0
    missing = bypass(host, "proxy")
    assert (missing["count"], missing["unit"]) == (30, "connections")
    assert 'backend = "owned"' in missing["advice"]
    # One line a minute at most: the first may have been written while they were made.
    until(lambda: "traffic passed uninspected: 30 connections" in log(host), "it is in the log")
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
        until(lambda: fetch(host, 1) == 1, "the published port answers")
        taken(host)
        judged(host)
    host.run("systemctl", "stop", "nfq-agent")
    assert ours(host) == []
    assert "nfq-agent" not in host.run("nft", "list", "ruleset").stdout
    assert fetch(host, 1) == 1


def test_ufw(beside: Container) -> None:
    host = beside
    web_server(host)
    host.shell("ufw --force enable; ufw allow in proto tcp to any port 8080")
    # What ufw writes when it is enabled again differs from the first time, without us.
    host.shell("ufw reload; ufw disable; ufw --force enable")
    rules = foreign(host)
    assert fetch(host, 1) == 1
    configure(host, PROXY)
    whole(host)
    # What is redirected to the proxy has its port by then, which ufw does not let in.
    assert fetch(host, 2, seconds=1) == 0
    assert "drops what it does not accept" in log(host)
    doctor = host.run("nfq-agent", "doctor", check=False).stdout
    line = "-p tcp -m multiport --dports 15002 -m conntrack --ctstate DNAT -j ACCEPT"
    assert line in " ".join(doctor.split())
    host.shell(f"iptables -I INPUT {line}")
    before = connections(host)
    assert fetch(host, 3) == 3
    assert connections(host) == before + 3
    host.shell(f"iptables -D INPUT {line}")
    assert fetch(host, 1, seconds=1) == 0
    # Where the administrator allows it, the agent puts such a line there, and ufw works as before.
    host.write("/etc/nfq-agent/conf.d/beside.toml", PROXY.replace("[rules.web]", "accept_input = true\n[rules.web]"))
    host.run("systemctl", "reload", "nfq-agent")
    before = connections(host)
    assert fetch(host, 3) == 3
    assert connections(host) == before + 3
    assert "accept.web" in host.run("iptables-nft", "-S", "INPUT").stdout
    for command in ("reload", "disable", "--force enable"):
        host.shell(f"ufw {command}")
        whole(host)
        judged(host)
        until(lambda: fetch(host, 1) == 1, "what is redirected to the proxy is accepted")
    assert foreign(host) == rules
    host.run("systemctl", "stop", "nfq-agent")
    assert foreign(host) == rules
    assert fetch(host, 1) == 1


@pytest.mark.parametrize("backend", ["nftables", "iptables"])
def test_firewalld(beside: Container, backend: str) -> None:
    host = beside
    host.shell(f"sed -i 's/^FirewallBackend=.*/FirewallBackend={backend}/' /etc/firewalld/firewalld.conf")
    host.run("systemctl", "start", "firewalld")
    host.shell("firewall-cmd --add-port=8080/tcp --permanent; firewall-cmd --reload")
    whole(host)
    rules = foreign(host)
    repairs = status(host)["drift"]["repairs"]
    for _ in range(2):
        host.run("firewall-cmd", "--reload")
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
    host.shell("touch /var/log/probe; systemctl start fail2ban")
    until(lambda: "probe" in host.run("fail2ban-client", "status", check=False).stdout, "the jail is there")
    for number in range(1, 21):
        host.run("fail2ban-client", "set", "probe", "banip", f"192.0.2.{number}")
        if number % 5 == 0:
            # Meanwhile ours are flushed, and written again.
            host.run("iptables-legacy", "-w", "-t", "mangle", "-F")
    until(lambda: foreign(host).count("192.0.2.") == 20, "all are banned")
    whole(host)
    # Both kinds side by side; the one that is flushed takes nothing of ours with it.
    host.shell("iptables-legacy -w -A INPUT -s 198.51.100.7 -j DROP; iptables-nft -A INPUT -s 198.51.100.8 -j DROP")
    assert "and neither tool shows the other's" in " ".join(host.run("nfq-agent", "doctor", check=False).stdout.split())
    host.run("nft", "flush", "ruleset")
    whole(host)
    judged(host)
    # What was flushed stays so, and the one legacy rule of others is left.
    left = foreign(host)
    assert re.findall("^-A .*$", left, re.MULTILINE) == ["-A INPUT -s 198.51.100.7/32 -j DROP"]
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
    # One line a minute at most.
    until(lambda: "rules were not in force" in log(host), "it is in the log")
    host.run("systemctl", "stop", "nfq-agent")
    assert ours(host) == []
    assert foreign(host) == left
