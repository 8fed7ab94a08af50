"""Names allowed and denied by the agent as it is, with real clients: split hellos, both families, reject, what began before."""

from __future__ import annotations

import socket
import subprocess
from functools import partial
from pathlib import Path

import pytest
from agent import Agent, until
from captures import certificate, listening
from namespace import Namespace
from openings import client_hello, dns_query

pytestmark = pytest.mark.kernel

POLICY = """
[queue.egress]
num = 110
elements = ["dpi", "allow"]

[element.allow]
type = "policy"
default = "{default}"
rule = [
  {{ action = "accept", tls_sni = ["*.good.test"] }},
  {{ action = "accept", http_host = ["*.good.test"] }},
]

[rules.egress]
queue = "egress"
hooks = {hooks}
tcp_ports = [4430, 8000, 4440]
role = "{role}"
"""


@pytest.fixture
def served(netns: Namespace, tmp_path: Path) -> Namespace:
    """TLS on 4430 and HTTP on 8000, over both families."""
    certificate(tmp_path)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for address in ("127.0.0.1", "[::1]"):
        netns.start("openssl", "s_server", "-accept", f"{address}:4430", "-cert", str(tmp_path / "cert.pem"),
                    "-key", str(tmp_path / "key.pem"), "-www", **quiet)  # fmt: skip
    netns.start("python3", "-m", "http.server", "8000", "--bind", "::", "-d", str(tmp_path), **quiet)
    for port in (4430, 8000):
        until(partial(listening, netns, port), f"port {port} is served")
    until(lambda: netns.run("ss", "-Hltn", "sport = :4430").stdout.count("LISTEN") == 2, "TLS is served in both families")
    return netns


def curl(netns: Namespace, name: str, address: str, port: int = 4430, limit: float = 30) -> int:
    """curl's exit code for a request to `name` at `address`."""
    scheme = "https" if port == 4430 else "http"
    host = f"[{address}]" if ":" in address else address
    done = netns.run(
        "curl", "-sk", "-o", "/dev/null", "-m", str(limit), "--resolve", f"{name}:{port}:{host}", f"{scheme}://{name}:{port}/",
        check=False,
    )  # fmt: skip
    return done.returncode


# curl(1), EXIT CODES
OK, TIMEOUT, RESET, TLS_FAILED, NOTHING, REFUSED = 0, 28, 56, 35, 52, 7


def start(netns: Namespace, folder: Path, default: str, hooks: str = '["output"]', role: str = "client") -> Agent:
    """The agent with the policy above."""
    return Agent(netns, folder, POLICY.format(default=default, hooks=hooks, role=role)).ready()


@pytest.mark.parametrize(("hooks", "role"), [('["output"]', "client"), ('["input"]', "server"), ('["input", "output"]', "both")])
def test_names_pass_or_not_in_both_families(served: Namespace, tmp_path: Path, hooks: str, role: str) -> None:
    agent = start(served, tmp_path, "drop", hooks, role)
    for address in ("127.0.0.1", "::1"):
        for port in (4430, 8000):
            assert curl(served, "www.good.test", address, port) == OK, agent.log
            assert curl(served, "www.evil.test", address, port, 0.4) == TIMEOUT, agent.log
    assert agent.stop() == 0


@pytest.mark.parametrize(("hooks", "role"), [('["output"]', "client"), ('["input"]', "server"), ('["input", "output"]', "both")])
def test_rejected_clients_fail_at_once(served: Namespace, tmp_path: Path, hooks: str, role: str) -> None:
    agent = start(served, tmp_path, "reject", hooks, role)
    for address in ("127.0.0.1", "::1"):
        for port in (4430, 8000):
            assert curl(served, "www.good.test", address, port) == OK, agent.log
            code = curl(served, "www.evil.test", address, port)
            assert code in (RESET, TLS_FAILED, NOTHING), (code, agent.log)
    # Neither end keeps a dead connection; the server learns a moment after the client that it is reset.
    dead = ("ss", "-Htn", "state", "established", "( sport = :4430 or dport = :4430 )")
    until(lambda: served.run(*dead).stdout == "", "no connection is left")
    assert agent.stop() == 0


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize("step", [1, 40, 300])
def test_split_hellos(served: Namespace, tmp_path: Path, family: int, step: int) -> None:
    agent = start(served, tmp_path, "reject")
    address = "127.0.0.1" if family == socket.AF_INET else "::1"
    # A piece a packet; with the smallest, the eighth packet brings the rest.
    good = served.call(speak, family, address, 4430, client_hello("a.good.test"), step)
    evil = served.call(speak, family, address, 4430, client_hello("a.evil.test"), step)
    assert good.startswith(b"\x16\x03"), agent.log
    assert evil == b"reset"
    assert agent.stop() == 0


def speak(family: int, address: str, port: int, data: bytes, step: int) -> bytes:
    """Say `data` in pieces of `step` bytes, the seventh being all the rest; the server's first answer, or how it ended."""
    with socket.create_connection((address, port), timeout=30) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for number in range(7):
            end = number * step + step if number < 6 else len(data)
            try:
                connection.sendall(data[number * step : end])
            except (ConnectionResetError, BrokenPipeError):
                return b"reset"
        try:
            return connection.recv(100) or b"closed"
        except ConnectionResetError:
            return b"reset"
        except TimeoutError:
            return b"nothing"


_ECHO = """
import socket
listener = socket.create_server(("::", 4440), family=socket.AF_INET6, dualstack_ipv6=True)
while True:
    connection = listener.accept()[0]
    try:
        while data := connection.recv(1000):
            connection.sendall(data)
    except OSError:
        pass
    connection.close()
"""


# linux/in6.h; destination options of padding alone (RFC 8200 4.6, 4.2).
_IPV6_DSTOPTS = 59
_PADDING = b"\0\0\1\4\0\0\0\0"


def test_extension_headers_hide_no_name(served: Namespace, tmp_path: Path) -> None:
    def speak_with_options(name: str) -> bytes:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as connection:
            connection.setsockopt(socket.IPPROTO_IPV6, _IPV6_DSTOPTS, _PADDING)
            connection.settimeout(30)
            connection.connect(("::1", 4430))
            connection.sendall(client_hello(name))
            try:
                return connection.recv(100) or b"closed"
            except ConnectionResetError:
                return b"reset"

    # What is sent really has the header: the rule that counts it is not a rule of ours.
    served.shell("ip6tables-legacy -w -t raw -A OUTPUT -m ipv6header --header dst --soft")
    agent = start(served, tmp_path, "reject")
    assert served.call(speak_with_options, "a.good.test").startswith(b"\x16\x03"), agent.log
    assert served.call(speak_with_options, "a.evil.test") == b"reset"
    counted = int(served.shell("ip6tables-legacy -w -t raw -nvxL OUTPUT").splitlines()[2].split()[0])
    assert counted >= 6
    assert agent.stop() == 0


DNS = """
[queue.dns]
elements = ["dpi", "names"]

[element.names]
type = "policy"
default = "accept"
rule = [
  { action = "reject", dns_name = ["*.evil.test"] },
]

[rules.dns]
queue = "dns"
hooks = ["output"]
udp_ports = [53]
role = "client"
"""


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_rejected_queries_fail_at_once(netns: Namespace, tmp_path: Path, address: str) -> None:
    netns.start(
        "dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts", "--user=root", "--pid-file=", "--address=/test/192.0.2.7",
        "--address=/test/2001:db8::7", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until(lambda: listening(netns, 53, "-u"), "the server is there")
    agent = Agent(netns, tmp_path, DNS).ready()

    def ask_for(name: str) -> bytes:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as client:
            client.settimeout(30)
            client.connect((address, 53))
            client.send(dns_query(name))
            try:
                return client.recv(1000)
            except ConnectionRefusedError:
                return b"refused"

    assert len(netns.call(ask_for, "www.good.test")) > 30, agent.log
    assert netns.call(ask_for, "www.evil.test") == b"refused", agent.log
    assert agent.stop() == 0


@pytest.mark.parametrize("where", ["server", "client"])
@pytest.mark.parametrize("address", ["10.203.0.1", "fd00:203::1"])
def test_rejected_across_the_wire(pair: tuple[Namespace, Namespace], tmp_path: Path, where: str, address: str) -> None:
    """Both ends are reset, the local and the remote one, whichever of them the agent is beside."""
    server, client = pair
    server.start("python3", "-c", _ECHO)
    until(lambda: listening(server, 4440), "the echo is served")
    host, hooks = (server, '["input"]') if where == "server" else (client, '["output"]')
    agent = start(host, tmp_path, "reject", hooks, where)
    good, evil = client_hello("a.good.test"), client_hello("a.evil.test")
    assert client.call(echo, address, good) == good, agent.log
    assert client.call(echo, address, evil) == b"reset", agent.log
    # Several segments, as one offloaded packet or one by one: the last of them is refused.
    large = client_hello("a.evil.test", alpn=[f"{number:03}" + "x" * 200 for number in range(30)])
    assert client.call(echo, address, large) == b"reset", agent.log
    client.run("ethtool", "-K", "eth0", "tso", "off", "gso", "off")
    assert client.call(echo, address, large) == b"reset", agent.log

    def left(end: Namespace) -> bool:
        return bool(end.run("ss", "-Htn", "state", "established").stdout)

    until(lambda: not any(map(left, pair)), "no connection is left")
    assert agent.stop() == 0


def echo(address: str, data: bytes) -> bytes:
    """What comes back for `data`, or how it ended."""
    back = b""
    with socket.create_connection((address, 4440), timeout=30) as connection:
        connection.sendall(data)
        try:
            # Segments that are undecided pass, so that an echo of the first says nothing.
            while len(back) < len(data):
                back += connection.recv(10000) or b"closed"
        except ConnectionResetError:
            return b"reset"
    return back


PORTS = """
[queue.ports]
mode = "{mode}"
elements = ["ports"]

[element.ports]
type = "policy"
rule = [ {{ action = "reject", dport = [4440] }} ]
default = "accept"

[rules.ports]
queue = "ports"
tcp_ports = [4440]
udp_ports = [4440]
"""


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_headers_alone_are_enough_to_reject(netns: Namespace, tmp_path: Path, address: str) -> None:
    netns.start("python3", "-c", _ECHO)
    until(lambda: listening(netns, 4440), "the echo is served")

    def attempt() -> tuple[str, str]:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            socket.create_connection((address, 4440), timeout=30).close()
            tcp = "connected"
        except OSError as error:
            tcp = type(error).__name__
        with socket.socket(family, socket.SOCK_DGRAM) as client:
            client.connect((address, 4440))
            client.settimeout(30)
            try:
                # Nothing listens there: without the agent the kernel says so itself, which is not a test.
                with socket.socket(family, socket.SOCK_DGRAM) as server:
                    server.bind((address, 4440))
                    client.send(b"x" * 3000)
                    client.recv(10)
                udp = "answered"
            except OSError as error:
                udp = type(error).__name__
        return tcp, udp

    agent = Agent(netns, tmp_path, PORTS.format(mode="monitor")).ready()
    assert netns.call(attempt)[0] == "connected", agent.log
    until(lambda: "would drop" in agent.log, "the monitor says what it would do")
    assert agent.stop() == 0
    agent.configure(PORTS.format(mode="enforce"))
    agent.start()
    agent.ready()
    assert netns.call(attempt) == ("ConnectionRefusedError", "ConnectionRefusedError"), agent.log
    assert agent.stop() == 0
