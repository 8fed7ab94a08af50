"""Names that DNS answers prove: real resolvers (dnsmasq, and answers by hand), real connections, both families."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from agent import Agent, until
from captures import listening
from clock import moved_clock
from name_servers import (
    COMES,
    CONFIG,
    ECHO_TCP,
    ECHO_UDP,
    GIVEN,
    HTTP,
    OTHER,
    TLS,
    ask,
    curl,
    echoes,
    named_hosts,
    resolved,
    start,
)
from namespace import Namespace
from openings import dns_query

pytestmark = pytest.mark.kernel


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Namespace, Namespace]]:
    """Servers, and the host with the agent."""
    with named_hosts(tmp_path) as hosts:
        yield hosts


@pytest.mark.parametrize("shared", [False, True], ids=["one-queue", "two-queues"])
@pytest.mark.parametrize("family", [4, 6])
def test_a_name_counts_for_the_addresses_that_dns_gave(
    hosts: tuple[Namespace, Namespace], tmp_path: Path, family: int, shared: bool
) -> None:
    _, host = hosts
    agent = start(host, tmp_path, shared=shared)
    given, other = GIVEN[family], OTHER[family]
    assert not curl(host, "a.good.test", given, TLS)
    assert not echoes(host, given, ECHO_TCP)
    assert given in ask(host, "a.good.test", family), agent.log
    for port in (TLS, HTTP):
        assert curl(host, "a.good.test", given, port, COMES), agent.log
        # The forged name: an allowed one, at an address that no answer gave for it.
        assert not curl(host, "a.good.test", other, port), agent.log
        assert not curl(host, "c.good.test", given, port), agent.log
    for port in (ECHO_TCP, ECHO_UDP):
        assert echoes(host, given, port, COMES), agent.log
        assert not echoes(host, other, port), agent.log
    assert ask(host, "bad.test", family)
    assert not curl(host, "a.good.test", other, TLS)
    assert agent.stop() == 0


@pytest.mark.parametrize("over", ["udp", "tcp"])
@pytest.mark.parametrize("family", [4, 6])
def test_aliases_and_tcp(hosts: tuple[Namespace, Namespace], tmp_path: Path, family: int, over: str) -> None:
    _, host = hosts
    agent = start(host, tmp_path)
    assert GIVEN[family] in ask(host, "b.good.test", family, over)
    assert curl(host, "b.good.test", GIVEN[family], TLS, COMES), agent.log
    assert not curl(host, "b.good.test", OTHER[family], TLS), agent.log
    assert agent.stop() == 0


def test_no_connection_comes_before_its_name(hosts: tuple[Namespace, Namespace], tmp_path: Path) -> None:
    """Thirty times: ask, and send in the moment in which the answer is there. Two queues, with a worker each."""
    servers, host = hosts
    for number in range(100, 130):
        servers.run("ip", "address", "add", f"10.203.0.{number}/24", "dev", "eth0")
    servers.start(sys.executable, "-c", MANY, stdout=subprocess.PIPE)
    until(partial(listening, servers, ECHO_UDP, "-u"), "the echo is served")
    agent = start(host, tmp_path, shared=True)

    def race() -> int:
        came = 0
        for number in range(100, 130):
            with (
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as resolver,
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
            ):
                resolver.connect(("10.203.0.1", 53))
                client.connect((f"10.203.0.{number}", ECHO_UDP))
                client.settimeout(COMES)
                resolver.send(dns_query(f"n{number}.good.test"))
                resolver.recv(1000)
                client.send(b"hello")
                try:
                    came += client.recv(100) == b"hello"
                except OSError:
                    return came
        return came

    assert host.call(race) == 30, agent.log
    assert agent.stop() == 0


MANY = """
import socket, threading
def datagrams(address):
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind((address, 2223))
    while True:
        data, who = udp.recvfrom(2000)
        udp.sendto(data, who)
for number in range(100, 130):
    threading.Thread(target=datagrams, args=(f"10.203.0.{number}",)).start()
"""


def test_names_outlive_a_restart_and_end_with_their_time(hosts: tuple[Namespace, Namespace], tmp_path: Path) -> None:
    _, host = hosts
    environment, offset = moved_clock(tmp_path)
    agent = Agent(host, tmp_path, CONFIG.format(resolvers='"10.203.0.1"', queue="egress", dns_queue=""), **environment).ready()
    assert ask(host, "a.good.test", 4)
    assert agent.stop() == 0
    agent.start()
    agent.ready()
    assert curl(host, "a.good.test", "10.203.0.1", TLS, COMES), agent.log
    # 5 seconds by the answer, which count as 60.
    with offset.open("r+b") as file:
        file.write(struct.pack("d", 61.0))
    # A worker that waits for packets looks at the clock at its next turn.
    until(lambda: not curl(host, "a.good.test", "10.203.0.1", TLS), "the name is forgotten")
    assert ask(host, "a.good.test", 4)
    assert curl(host, "a.good.test", "10.203.0.1", TLS, COMES), agent.log
    assert agent.stop() == 0


STUB = """
[queue.egress]
num = 111
elements = ["dpi", "allow"]

[element.allow]
type = "policy"
default = "drop"
rule = [
  { action = "accept", protocol = "dns" },
  { action = "accept", dport = [4430], tls_sni = ["*.good.test"], verify = "dns" },
]

[rules.egress]
queue = "egress"
hooks = ["output", "forward"]
all = true
role = "client"
"""


def test_a_local_stub_by_the_hosts_own_settings(hosts: tuple[Namespace, Namespace], tmp_path: Path) -> None:
    """What resolves is on the host, at the address of systemd-resolved, and only output is judged."""
    _, host = hosts
    host.start(
        "dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts", "--user=root", "--pid-file=", "--bind-interfaces",
        "--listen-address=127.0.0.53", "--address=/a.good.test/10.203.0.1", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until(partial(listening, host, 53, "-u"), "the stub is there")
    host.shell("rm -f /etc/resolv.conf; echo nameserver 127.0.0.53 >/etc/resolv.conf")
    agent = Agent(host, tmp_path, STUB).ready()
    assert not curl(host, "a.good.test", "10.203.0.1", TLS)
    assert "10.203.0.1" in host.run("dig", "+short", "+tries=1", "+time=60", "a.good.test").stdout, agent.log
    assert curl(host, "a.good.test", "10.203.0.1", TLS, COMES), agent.log
    assert not curl(host, "a.good.test", "10.203.0.3", TLS)
    assert agent.stop() == 0


def test_doctor_warns_where_any_user_can_answer_as_a_resolver(hosts: tuple[Namespace, Namespace], tmp_path: Path) -> None:
    _, host = hosts
    agent = Agent(host, tmp_path, STUB).ready()
    warned = "any user of this host can answer as 127.0.0.53, 127.0.0.54"
    assert warned not in agent.verb("doctor", check=False).stdout
    host.run("sysctl", "-q", "-w", "net.ipv4.ip_unprivileged_port_start=53")
    assert warned in " ".join(agent.verb("doctor", check=False).stdout.split())
    assert agent.stop() == 0


def test_systemd_resolved(hosts: tuple[Namespace, Namespace], tmp_path: Path) -> None:
    """The real stub on the host, and dnsmasq on another one, which it asks; only output is judged."""
    program = resolved()
    _, host = hosts
    host.shell(
        "echo systemd-resolve:x:991:991::/:/bin/false >>/etc/passwd; echo systemd-resolve:x:991: >>/etc/group;"
        "install -d -o 991 -g 991 /run/systemd/resolve; mkdir -p /etc/systemd; rm -f /etc/resolv.conf;"
        "echo nameserver 127.0.0.53 >/etc/resolv.conf; printf '[Resolve]\\nDNS=10.203.0.1\\nDNSSEC=no\\nDNSOverTLS=no\\n"
        "LLMNR=no\\nMulticastDNS=no\\n' >/etc/systemd/resolved.conf"
    )
    agent = Agent(host, tmp_path, STUB).ready()
    host.start(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(partial(listening, host, 53, "-u"), "systemd-resolved listens")
    assert not curl(host, "a.good.test", "10.203.0.1", TLS)
    for question in (("+notcp",), ("+tcp",), ("+edns=0",)):
        said = host.run("dig", "+short", "+tries=1", "+time=60", "@127.0.0.53", *question, "a.good.test").stdout
        assert "10.203.0.1" in said, agent.log
    # As any program of the host asks.
    assert "10.203.0.1" in host.run("getent", "ahostsv4", "a.good.test").stdout
    assert curl(host, "a.good.test", "10.203.0.1", TLS, COMES), agent.log
    assert not curl(host, "a.good.test", "10.203.0.3", TLS)
    assert agent.stop() == 0


def test_a_connection_keeps_its_name_when_the_worker_is_replaced(hosts: tuple[Namespace, Namespace], tmp_path: Path) -> None:
    """Its time has passed by then; the connection continues."""
    _, host = hosts
    environment, offset = moved_clock(tmp_path)
    agent = Agent(host, tmp_path, CONFIG.format(resolvers='"10.203.0.1"', queue="egress", dns_queue=""), **environment).ready()
    assert ask(host, "a.good.test", 4)
    child = host.start(sys.executable, "-c", KEPT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline() == b"hello\n"
    with offset.open("r+b") as file:
        file.write(struct.pack("d", 3600.0))
    agent.configure(agent.config.read_text().replace("num = 111", "num = 111\nmax_len = 5000"))
    agent.verb("reload")
    child.stdin.write(b"go\n")
    child.stdin.flush()
    assert child.stdout.readline() == b"hello\n", agent.log
    assert agent.stop() == 0


KEPT = """
import socket, sys
connection = socket.create_connection(("10.203.0.1", 2222), timeout=60)
for _ in range(2):
    connection.sendall(b"hello")
    print(connection.recv(100).decode(), flush=True)
    sys.stdin.readline()
"""
