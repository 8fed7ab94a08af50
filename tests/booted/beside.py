"""What the tests beside other programs share: a proxy's configuration, a peer elsewhere, and what they look at."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from booted.container import Container
from booted.nspawn import until
from booted.peers import exchange, ours, saved, status

_RULE = re.compile(r"-p tcp -m multiport --ports 11000")
# A proxy for what comes from elsewhere to port 8080, beside the baseline's queue.
PROXY = """[proxy.web]
listen = ["0.0.0.0:15002", "[::]:15002"]
[rules.web]
proxy = "web"
tcp_ports = [8080]
hooks = ["prerouting"]
"""
# A network namespace for a peer: what it sends arrives by an interface, as from another host.
FAR = """
ip netns add far
ip link add near type veth peer name far netns far
ip address add 10.9.0.1/24 dev near; ip link set near up
ip -n far address add 10.9.0.2/24 dev far
ip -n far link set far up
ip -n far link set lo up
"""


def serving(host: Container) -> None:
    until(lambda: host.show("nfq-agent", "ActiveState") == "active", "nfq-agent is active")


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


def whole(host: Container) -> None:
    """Wait until all rules of the baseline are in the kernel."""
    until(lambda: len([line for line in ours(host) if _RULE.search(line)]) == 4, "our rules are back")


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


# argv: how many requests, the port, and seconds to wait for each. Prints how many are answered with an ELF file.
_FETCH = """
import sys, urllib.request
good = 0
for _ in range(int(sys.argv[1])):
    try:
        with urllib.request.urlopen(f"http://10.9.0.1:{sys.argv[2]}/bin/busybox", timeout=float(sys.argv[3])) as answer:
            good += answer.read(4) == b"\\x7fELF"
    except OSError:
        pass
print(good)
"""


def fetch(host: Container, count: int = 1, port: int = 8080, seconds: float = 20) -> int:
    """How many requests of the peer elsewhere are answered, each within `seconds`."""
    words = ("nsenter", "--net=/run/netns/far", "python3", "-c", _FETCH, str(count), str(port), str(seconds))
    return int(host.run(*words).stdout)


def taken(host: Container) -> None:
    """Each of five requests is answered, through the proxy."""
    before = connections(host)
    assert fetch(host, 5) == 5
    assert connections(host) == before + 5


def active_since(host: Container, unit: str) -> float:
    """When a unit became active, in seconds of the host's monotonic clock."""
    return int(host.show(unit, "ActiveEnterTimestampMonotonic")) / 1e6


WEB = """[Service]
ExecStart=/usr/bin/busybox httpd -f -p 8080 -h /usr
[Install]
WantedBy=multi-user.target
"""


def web_server(host: Container) -> None:
    """One of the host itself on port 8080."""
    host.run("systemd-run", "--unit=web", "busybox", "httpd", "-f", "-p", "8080", "-h", "/usr")
    until(lambda: ":8080" in host.run("ss", "-ltn").stdout, "it listens")
