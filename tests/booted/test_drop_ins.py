"""The drop-ins of the package, on a booted host: without one the unit refuses what it is for, with it that works."""

from __future__ import annotations

from booted.container import Container
from booted.nspawn import until
from booted.peers import drop_in, exchange_in_a_unit, saved, status

REJECTS = """
[queue.main]
elements = ["rules"]
[element.rules]
type = "policy"
[[element.rules.rule]]
dport = 9
action = "reject"
"""


def test_each_drop_in_does_what_it_is_for(host: Container) -> None:
    host.run("systemctl", "stop", "nfq-agent")
    features = {
        "reject": (REJECTS, "queue 100"),
        "tap": ('[tap.all]\ninterfaces = ["lo"]\n', "tap all"),
        "inline": ('[inline.all]\ninterfaces = ["lo"]\n', "inline all"),
    }
    for name, (config, serves) in features.items():
        host.write("/etc/nfq-agent/conf.d/feature.toml", config)
        assert host.run("systemctl", "start", "nfq-agent", check=False).returncode != 0, name
        host.run("systemctl", "reset-failed", "nfq-agent", check=False)
        drop_in(host, name)
        started = host.run("systemctl", "start", "nfq-agent", check=False)
        assert started.returncode == 0, (name, host.journal("--unit=nfq-agent"))
        # It comes after READY=1, for which `systemctl start` waits.
        until(lambda serves=serves: serves in host.show("nfq-agent", "StatusText"), "the status is told")  # type: ignore[misc]  # its default is the text
        host.run("systemctl", "stop", "nfq-agent")
        host.run("rm", f"/etc/systemd/system/nfq-agent.service.d/{name}.conf", "/etc/nfq-agent/conf.d/feature.toml")
        host.run("systemctl", "daemon-reload")


_REFUSES = (
    REJECTS
    + """
[rules.nine]
queue = "main"
hooks = ["output"]
tcp_ports = [9]
udp_ports = [9]
role = "client"
"""
)
# There is a server, so that only the agent refuses.
_REFUSED = """
import socket
for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
    server = socket.create_server((address, 9), family=family)
    client = socket.socket(family, socket.SOCK_STREAM)
    client.settimeout(60)
    assert client.connect_ex((address, 9)) == 111, "a TCP client is refused"
    server, client = (socket.socket(family, socket.SOCK_DGRAM) for _ in range(2))
    server.bind((address, 9))
    server.setblocking(False)
    client.settimeout(60)
    client.connect((address, 9))
    client.send(b"hello")
    try:
        client.recv(100)
        raise AssertionError("a UDP client is refused")
    except ConnectionRefusedError:
        pass
    try:
        server.recv(100)
        raise AssertionError("nothing arrives")
    except BlockingIOError:
        pass
"""


def test_reject_under_the_packaged_unit(host: Container) -> None:
    """Refused at start with the message that a proxy gets; with the drop-in clients are told, and the log says "reject"."""
    host.run("systemctl", "stop", "nfq-agent")
    before = saved(host)
    host.write("/etc/nfq-agent/conf.d/refuses.toml", _REFUSES)
    assert host.run("systemctl", "start", "nfq-agent", check=False).returncode != 0
    assert host.show("nfq-agent", "ExecMainStatus") == "78"
    journal = host.journal("--unit=nfq-agent")
    assert "IPAddressDeny" in journal
    assert "the drop-in reject.conf" in journal
    assert saved(host) == before
    drop_in(host, "reject")
    host.run("systemctl", "reset-failed", "nfq-agent", check=False)
    host.run("systemctl", "start", "nfq-agent")
    host.run("python3", "-c", _REFUSED)
    until(lambda: "NFQ_VERDICT=reject" in host.journal("--unit=nfq-agent", "--output=verbose"), "the log says reject")
    assert "NFQ_RULE=rule 1" in host.journal("--unit=nfq-agent", "--output=verbose")


_PROGRAMS = """
[queue.main]
elements = ["record"]
[element.record]
exe = true
events = "begin"
"""


def test_the_drop_in_for_programs(host: Container) -> None:
    """Without it the program of another user is not known, and the log says what is lacking."""
    host.write("/etc/nfq-agent/conf.d/programs.toml", _PROGRAMS)
    host.run("systemctl", "restart", "nfq-agent")
    until(lambda: "the drop-in exe.conf of the unit" in host.journal("--unit=nfq-agent"), "it says what is missing")
    exchange_in_a_unit(host)
    until(lambda: "NFQ_EVENT=begin" in host.journal("--unit=nfq-agent", "--output=verbose"), "there is a record")
    program = "NFQ_EXE=" + host.run("readlink", "-f", "/usr/bin/python3").stdout.strip()
    assert program not in host.journal("--unit=nfq-agent", "--output=verbose")
    drop_in(host, "exe")
    host.run("systemctl", "restart", "nfq-agent")
    exchange_in_a_unit(host)
    until(lambda: program in host.journal("--unit=nfq-agent", "--output=verbose"), "the program is known")


def test_a_proxy_needs_the_unit_to_allow_ip(host: Container) -> None:
    host.run("systemctl", "stop", "nfq-agent")
    before = saved(host)
    host.write(
        "/etc/nfq-agent/conf.d/proxy.toml",
        '[proxy.tcp]\nlisten = ["127.0.0.1:15002"]\n'
        '[rules.proxied]\nproxy = "tcp"\nhooks = ["output"]\ntcp_ports = [8080]\nfamily = "inet"\n',
    )
    assert host.run("systemctl", "start", "nfq-agent", check=False).returncode != 0
    assert host.show("nfq-agent", "ExecMainStatus") == "78"
    assert "IPAddressDeny" in host.journal("--unit=nfq-agent")
    assert saved(host) == before
    drop_in(host, "proxy")
    host.run("systemctl", "start", "nfq-agent")
    host.run("python3", "-c", _THROUGH_PROXY)
    (proxy,) = status(host)["proxies"]
    assert proxy["counters"]["connections"] >= 1


_THROUGH_PROXY = """
import socket
server = socket.create_server(("127.0.0.1", 8080))
client = socket.create_connection(("127.0.0.1", 8080), timeout=60)
server.settimeout(60)
connection, peer = server.accept()
assert peer != client.getsockname(), "the connection did not go through the proxy"
client.sendall(b"there")
assert connection.recv(5) == b"there"
connection.sendall(b"back")
assert client.recv(4) == b"back"
"""
