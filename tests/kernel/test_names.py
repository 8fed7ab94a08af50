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
from captures import certificate, listening, wait_until
from clock import moved_clock
from namespace import Namespace, join
from openings import dns_query

pytestmark = pytest.mark.kernel

CONFIG = """
[agent]
resolvers = [{resolvers}]

[queue.egress]
num = 111
midstream = "drop"
elements = ["dpi", "allow"]

[element.allow]
type = "policy"
default = "drop"
undecided = "accept"
rule = [
  {{ action = "accept", dport = [53] }},
  {{ action = "accept", sport = [53] }},
  {{ action = "accept", dport = [4430], tls_sni = ["*.good.test"], verify = "dns" }},
  {{ action = "accept", dport = [8000], http_host = ["*.good.test"], verify = "dns" }},
  {{ action = "accept", dport = [2222, 2223], dst_name = ["*.good.test"] }},
]
{dns_queue}
[rules.egress]
queue = "egress"
hooks = ["input", "output"]
tcp_ports = [4430, 8000, 2222, 53]
udp_ports = [2223]
role = "client"

[rules.dns]
queue = "{queue}"
hooks = ["input", "output"]
tcp_ports = [53]
udp_ports = [53]
role = "client"
"""
OTHER_QUEUE = """
[queue.dns]
num = 112
elements = ["dpi"]
"""
# Servers: .1 is what DNS gives, .3 is another address of the same host. The resolver is at .1 too.
GIVEN = {4: "10.203.0.1", 6: "fd00:203::1"}
OTHER = {4: "10.203.0.3", 6: "fd00:203::3"}
TLS, HTTP, ECHO_TCP, ECHO_UDP = 4430, 8000, 2222, 2223
KINDS = {4: 1, 6: 28}

ECHO = """
import socket, ssl, sys, threading
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[1] + "/cert.pem", sys.argv[1] + "/key.pem")
tls = socket.create_server(("::", 4430), family=socket.AF_INET6, dualstack_ipv6=True)
tcp = socket.create_server(("::", 2222), family=socket.AF_INET6, dualstack_ipv6=True)
def datagrams(address):
    udp = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind((address, 2223))
    while True:
        data, who = udp.recvfrom(2000)
        udp.sendto(data, who)
for address in ("10.203.0.1", "10.203.0.3", "fd00:203::1", "fd00:203::3"):
    threading.Thread(target=datagrams, args=(address,), daemon=True).start()
def secure(connection):
    try:
        with context.wrap_socket(connection, server_side=True) as client:
            client.recv(2000)
            client.sendall(b"HTTP/1.0 200 OK\\r\\n\\r\\nhello")
    except OSError:
        pass
def securely():
    while True:
        threading.Thread(target=secure, args=(tls.accept()[0],), daemon=True).start()
threading.Thread(target=securely, daemon=True).start()
print("ready", flush=True)
def serve(connection):
    while data := connection.recv(2000):
        connection.sendall(data)
while True:
    threading.Thread(target=serve, args=(tcp.accept()[0],), daemon=True).start()
"""
DNSMASQ = (
    "--address=/a.good.test/10.203.0.1", "--address=/a.good.test/fd00:203::1",
    "--host-record=edge.cdn.test,10.203.0.1,fd00:203::1", "--cname=b.good.test,edge.cdn.test",
    "--host-record=bad.test,10.203.0.3,fd00:203::3", "--local-ttl=5", "--bind-interfaces", "--listen-address=10.203.0.1",
    "--listen-address=fd00:203::1", *(f"--address=/n{number}.good.test/10.203.0.{number}" for number in range(100, 130)),
)  # fmt: skip


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Namespace, Namespace]]:
    """Servers, and the host with the agent."""
    with Namespace() as servers, Namespace() as host:
        join(servers, host)
        servers.run("ip", "address", "add", "10.203.0.3/24", "dev", "eth0")
        servers.run("ip", "-6", "address", "add", "fd00:203::3/64", "dev", "eth0", "nodad")
        certificate(tmp_path)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        servers.start("python3", "-m", "http.server", "8000", "--bind", "::", "-d", str(tmp_path), **quiet)
        servers.start(
            "dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts", "--user=root", "--pid-file=", *DNSMASQ, **quiet
        )
        echo = servers.start(sys.executable, "-c", ECHO, str(tmp_path), stdout=subprocess.PIPE)
        assert echo.stdout is not None
        assert echo.stdout.readline() == b"ready\n"
        for port in (TLS, HTTP, 53):
            wait_until(partial(listening, servers, port), f"port {port} is served")
        yield servers, host


def start(host: Namespace, folder: Path, resolvers: str = '"10.203.0.1", "fd00:203::1"', shared: bool = False) -> Agent:
    """The agent; shared: a queue of its own sees the DNS."""
    queue, more = ("dns", OTHER_QUEUE) if shared else ("egress", "")
    return Agent(host, folder, CONFIG.format(resolvers=resolvers, queue=queue, dns_queue=more)).ready()


def ask(host: Namespace, name: str, family: int, over: str = "udp") -> str:
    """dig's answer."""
    argv = ["dig", "+short", "+tries=1", "+time=2", f"@{GIVEN[family]}", name, "A" if family == 4 else "AAAA"]
    return host.run(*argv, *(["+tcp"] if over == "tcp" else []), check=False).stdout


def curl(host: Namespace, name: str, address: str, port: int, limit: float = 0.6) -> bool:
    scheme = "https" if port == TLS else "http"
    where = f"[{address}]" if ":" in address else address
    done = host.run(
        "curl", "-sk", "-o", "/dev/null", "-m", str(limit), "--resolve", f"{name}:{port}:{where}", f"{scheme}://{name}:{port}/",
        check=False,
    )  # fmt: skip
    return done.returncode == 0


def echoes(host: Namespace, address: str, port: int) -> bool:
    def say() -> bool:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM if port == ECHO_UDP else socket.SOCK_STREAM) as client:
            client.settimeout(0.5)
            try:
                client.connect((address, port))
                client.send(b"hello")
                return client.recv(100) == b"hello"
            except OSError:
                return False

    return host.call(say)


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
        assert curl(host, "a.good.test", given, port, 3), agent.log
        # The forged name: an allowed one, at an address that no answer gave for it.
        assert not curl(host, "a.good.test", other, port), agent.log
        assert not curl(host, "c.good.test", given, port), agent.log
    for port in (ECHO_TCP, ECHO_UDP):
        assert echoes(host, given, port), agent.log
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
    assert curl(host, "b.good.test", GIVEN[family], TLS, 3), agent.log
    assert not curl(host, "b.good.test", OTHER[family], TLS), agent.log
    assert agent.stop() == 0


class Resolver:
    """A resolver that answers by hand, on port 53 of the servers: what `reply` makes of each query is sent."""

    def __init__(self, servers: Namespace, reply: str) -> None:
        self.process = servers.start(sys.executable, "-c", RESOLVER.replace("REPLY", reply), stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"


RESOLVER = """
import socket, struct
def labels(name):
    return b"".join(bytes((len(each),)) + each.encode() for each in name.split(".")) + bytes(1)
def record(name, kind, data, seconds=60):
    return labels(name) + struct.pack("!HHIH", kind, 1, seconds, len(data)) + data
def message(number, question, *records, flags=0x8180):
    return struct.pack("!6H", number, flags, 1, len(records), 0, 0) + question + b"".join(records)
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("10.203.0.3", 53))
print("ready", flush=True)
while True:
    query, who = udp.recvfrom(2000)
    number, = struct.unpack_from("!H", query)
    end = query.index(bytes(1), 12) + 5
    question = query[12:end]
    kind, = struct.unpack("!H", question[-4:-2])
    for reply in REPLY:
        udp.sendto(reply, who)
"""


def query(host: Namespace, name: str, kind: int = 1, wait: float = 0.4) -> None:
    """Ask, and read what comes."""

    def say() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(wait)
            client.connect(("10.203.0.3", 53))
            client.send(dns_query(name, kind))
            try:
                while True:
                    client.recv(2000)
            except OSError:
                pass

    host.call(say)


ADDRESS = "bytes((10, 203, 0, 1))"
GOOD = f'record("a.good.test", 1, {ADDRESS})'
# What an answer is made of, and whether it is believed.
FORGED = {
    "sound": (f"[message(number, question, {GOOD})]", True),
    "another-number": (f"[message(number ^ 1, question, {GOOD})]", False),
    "another-question": (f'[message(number, labels("b.good.test") + question[-4:], {GOOD})]', False),
    "another-type": (f"[message(number, question[:-4] + bytes((0, 28, 0, 1)), {GOOD})]", False),
    "an-error": (f"[message(number, question, {GOOD}, flags=0x8183)]", False),
    "no-response": (f"[message(number, question, {GOOD}, flags=0x0100)]", False),
    "another-owner": (f'[message(number, question, record("c.good.test", 1, {ADDRESS}))]', False),
    "the-second": (f'[message(number, question, record("a.good.test", 1, bytes(4))), message(number, question, {GOOD})]', False),
}


@pytest.mark.parametrize("kind", FORGED)
def test_forged_answers_are_not_believed(hosts: tuple[Namespace, Namespace], tmp_path: Path, kind: str) -> None:
    servers, host = hosts
    reply, believed = FORGED[kind]
    Resolver(servers, reply)
    agent = start(host, tmp_path, '"10.203.0.3"')
    query(host, "a.good.test")
    assert echoes(host, "10.203.0.1", ECHO_TCP) is believed, agent.log
    assert agent.stop() == 0


def test_the_answer_of_another_resolver_is_not_believed(hosts: tuple[Namespace, Namespace], tmp_path: Path) -> None:
    servers, host = hosts
    Resolver(servers, FORGED["sound"][0])
    agent = start(host, tmp_path)
    query(host, "a.good.test")
    assert not echoes(host, "10.203.0.1", ECHO_TCP), agent.log
    assert agent.stop() == 0


def test_an_answer_without_a_question_is_not_believed(hosts: tuple[Namespace, Namespace], tmp_path: Path) -> None:
    servers, host = hosts
    agent = start(host, tmp_path, '"10.203.0.3"')

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as resolver:
            resolver.bind(("10.203.0.3", 53))
            name = b"\1a\4good\4test\0"
            answer = name + struct.pack("!HHIH", 1, 1, 60, 4) + socket.inet_aton("10.203.0.1")
            message = struct.pack("!6H", 7, 0x8180, 1, 1, 0, 0) + name + struct.pack("!HH", 1, 1) + answer
            resolver.sendto(message, ("10.203.0.2", 5555))

    servers.call(send)
    until(lambda: agent.totals("egress")["received"] >= 1, "the answer was judged")
    assert not echoes(host, "10.203.0.1", ECHO_TCP), agent.log
    assert agent.stop() == 0


SERVICE = {
    # A hint for the name itself; another host with a hint; another host whose address is asked for by itself, as an alias too.
    "own-hint": ("bytes((0, 1, 0, 0, 4, 0, 4)) + ADDRESS", False),
    "host-with-hint": ('bytes((0, 1)) + labels("edge.cdn.test") + bytes((0, 4, 0, 4)) + ADDRESS', False),
    "host": ('bytes((0, 1)) + labels("edge.cdn.test") + bytes((0, 1, 0, 3, 2)) + b"h2"', True),
    "alias": ('bytes(2) + labels("edge.cdn.test")', True),
}


@pytest.mark.parametrize("kind", SERVICE)
def test_service_records(hosts: tuple[Namespace, Namespace], tmp_path: Path, kind: str) -> None:
    servers, host = hosts
    data, asks_again = SERVICE[kind]
    record = f'record("a.good.test", 65, {data.replace("ADDRESS", ADDRESS)})'
    Resolver(servers, f'[message(number, question, {record} if kind == 65 else record("edge.cdn.test", 1, {ADDRESS}))]')
    agent = start(host, tmp_path, '"10.203.0.3"')
    query(host, "a.good.test", 65)
    if asks_again:
        assert not curl(host, "a.good.test", "10.203.0.1", TLS), agent.log
        query(host, "edge.cdn.test", 1)
    assert curl(host, "a.good.test", "10.203.0.1", TLS, 3), agent.log
    assert not curl(host, "a.good.test", "10.203.0.3", TLS), agent.log
    assert agent.stop() == 0


def test_no_connection_comes_before_its_name(hosts: tuple[Namespace, Namespace], tmp_path: Path) -> None:
    """Thirty times: ask, and send in the moment in which the answer is there. Two queues, with a worker each."""
    servers, host = hosts
    for number in range(100, 130):
        servers.run("ip", "address", "add", f"10.203.0.{number}/24", "dev", "eth0")
    servers.start(sys.executable, "-c", MANY, stdout=subprocess.PIPE)
    wait_until(partial(listening, servers, ECHO_UDP, "-u"), "the echo is served")
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
                client.settimeout(1)
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
    assert curl(host, "a.good.test", "10.203.0.1", TLS, 3), agent.log
    # 5 seconds by the answer, which count as 60.
    with offset.open("r+b") as file:
        file.write(struct.pack("d", 61.0))
    # A worker that waits for packets looks at the clock at its next turn.
    until(lambda: not curl(host, "a.good.test", "10.203.0.1", TLS), "the name is forgotten")
    assert ask(host, "a.good.test", 4)
    assert curl(host, "a.good.test", "10.203.0.1", TLS, 3), agent.log
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
    wait_until(partial(listening, host, 53, "-u"), "the stub is there")
    host.shell("rm -f /etc/resolv.conf; echo nameserver 127.0.0.53 >/etc/resolv.conf")
    agent = Agent(host, tmp_path, STUB).ready()
    assert not curl(host, "a.good.test", "10.203.0.1", TLS)
    assert "10.203.0.1" in host.run("dig", "+short", "+tries=1", "+time=2", "a.good.test").stdout, agent.log
    assert curl(host, "a.good.test", "10.203.0.1", TLS, 3), agent.log
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
connection = socket.create_connection(("10.203.0.1", 2222), timeout=3)
for _ in range(2):
    connection.sendall(b"hello")
    print(connection.recv(100).decode(), flush=True)
    sys.stdin.readline()
"""
