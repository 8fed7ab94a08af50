"""Servers with names, and a host whose agent reads what DNS says about them: real resolvers, real connections, both families."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from agent import Agent, until
from captures import certificate, listening
from namespace import Namespace, join
from openings import dns_query

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


def resolved() -> str:
    """The program systemd-resolved: unpacked by tests/run, since its package would take over this host's resolver."""
    unpacked = Path(__file__).parent.parent.parent / "build" / "unpacked" / "systemd-resolved"
    places = [*unpacked.glob("**/lib/systemd/systemd-resolved"), Path("/lib/systemd/systemd-resolved")]
    for place in places:
        if place.is_file():
            return str(place)
    pytest.skip("systemd-resolved is not unpacked (tests/run --kernel does it)")


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


# Seconds that an answer may take which is to come; and those in which one that is not to come would be there.
COMES = 60.0


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
            client.sendall(b"HTTP/1.0 200 OK\\r\\nContent-Length: 5\\r\\n\\r\\nhello")
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


@contextlib.contextmanager
def named_hosts(tmp_path: Path) -> Iterator[tuple[Namespace, Namespace]]:
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
            until(partial(listening, servers, port), f"port {port} is served")
        yield servers, host


def start(host: Namespace, folder: Path, resolvers: str = '"10.203.0.1", "fd00:203::1"', shared: bool = False) -> Agent:
    """The agent; shared: a queue of its own sees the DNS."""
    queue, more = ("dns", OTHER_QUEUE) if shared else ("egress", "")
    return Agent(host, folder, CONFIG.format(resolvers=resolvers, queue=queue, dns_queue=more)).ready()


def ask(host: Namespace, name: str, family: int, over: str = "udp") -> str:
    """dig's answer."""
    argv = ["dig", "+short", "+tries=1", "+time=60", f"@{GIVEN[family]}", name, "A" if family == 4 else "AAAA"]
    return host.run(*argv, *(["+tcp"] if over == "tcp" else []), check=False).stdout


def curl(host: Namespace, name: str, address: str, port: int, limit: float = 0.6) -> bool:
    scheme = "https" if port == TLS else "http"
    where = f"[{address}]" if ":" in address else address
    done = host.run(
        "curl", "-sk", "-o", "/dev/null", "-m", str(limit), "--resolve", f"{name}:{port}:{where}", f"{scheme}://{name}:{port}/",
        check=False,
    )  # fmt: skip
    return done.returncode == 0


def echoes(host: Namespace, address: str, port: int, limit: float = 0.5) -> bool:
    """Whether a server sends back what it gets within so many seconds."""

    def say() -> bool:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM if port == ECHO_UDP else socket.SOCK_STREAM) as client:
            client.settimeout(limit)
            try:
                client.connect((address, port))
                client.send(b"hello")
                return client.recv(100) == b"hello"
            except OSError:
                return False

    return host.call(say)


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
