"""What a peer on the wire gets told by `reject`: errors within the kernel's own limits, and none about broadcasts."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from agent import Agent, until
from namespace import Namespace

pytestmark = pytest.mark.kernel
CONFIG = """
[queue.q]
num = 9
elements = ["refuse", "log"]
[element.refuse]
type = "policy"
default = "reject"
[rules.r]
queue = "q"
hooks = ["input"]
udp_ports = [9]
role = "server"
"""


def send(family: int, destination: str, count: int) -> int:
    """Send datagrams without an answer; how many errors they brought, as far as they came at once."""
    with socket.socket(family, socket.SOCK_DGRAM) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        for _ in range(count):
            end.sendto(b"hello", (destination, 9))
    return count


def unreachable(namespace: Namespace, ipv6: bool) -> int:
    """ICMP "destination unreachable" that the namespace has received."""
    if ipv6:
        text = namespace.run("cat", "/proc/net/snmp6").stdout
        return int(next(line.split()[1] for line in text.splitlines() if line.startswith("Icmp6InDestUnreachs")))
    names, values = (line.split() for line in namespace.run("cat", "/proc/net/snmp").stdout.splitlines() if line[:5] == "Icmp:")
    return int(values[names.index("InDestUnreachs")])


@pytest.mark.parametrize("ipv6", [False, True], ids=["inet", "inet6"])
def test_errors_are_limited(pair: tuple[Namespace, Namespace], tmp_path: Path, ipv6: bool) -> None:
    server, client = pair
    agent = Agent(server, tmp_path, CONFIG).ready()
    family, destination = (socket.AF_INET6, "fd00:203::1") if ipv6 else (socket.AF_INET, "10.203.0.1")
    client.call(send, family, destination, 2000)
    until(lambda: agent.totals("q")["received"] == 2000, "all were judged")
    assert agent.totals("q")["dropped"] == 2000
    # 6 at once and one for each second that it took. An error is sent behind the verdict.
    until(lambda: unreachable(client, ipv6) >= 6, "errors have come")
    assert unreachable(client, ipv6) < 40
    assert " reject," in agent.log
    assert agent.stop() == 0


def test_no_answer_to_a_broadcast(pair: tuple[Namespace, Namespace], tmp_path: Path) -> None:
    server, client = pair
    agent = Agent(server, tmp_path, CONFIG).ready()
    client.call(send, socket.AF_INET, "10.203.0.255", 3)
    until(lambda: agent.totals("q")["dropped"] == 3, "they were judged")
    client.call(send, socket.AF_INET, "10.203.0.1", 1)
    until(lambda: unreachable(client, False) == 1, "the one that was for this host alone was answered")
    assert "could not be sent" not in agent.log
    assert agent.stop() == 0
