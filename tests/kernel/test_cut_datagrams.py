"""UDP packets with bytes behind their datagram: the receiver's kernel cuts them off, so they hide no message from the agent."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
from agent import Agent, until
from namespace import Namespace
from openings import dns_query

from nfq_agent.checksum import internet_checksum
from nfq_agent.testing import udp

pytestmark = pytest.mark.kernel
CONFIG = """
[queue.q]
elements = ["dpi", "deny"]
[element.deny]
type = "policy"
default = "accept"
rule = [{ action = "drop", dns_name = ["*.bad.test"] }]
[rules.r]
queue = "q"
hooks = ["input"]
udp_ports = [5300]
"""
# Writes each datagram that arrives.
RECEIVER = """
import socket
end = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
end.bind(("::", 5300))
print("ready", flush=True)
while True:
    print(end.recv(2000).hex(), flush=True)
"""
HOSTS = {4: ("10.203.0.2", "10.203.0.1"), 6: ("fd00:203::2", "fd00:203::1")}
BEHIND = bytes(9)


def send(family: int, message: bytes) -> None:
    """A datagram with bytes behind it in its packet, from a raw socket."""
    src, dst = (f"[{host}]" if family == 6 else host for host in HOSTS[family])
    data = bytearray(udp(f"{src}:4000", f"{dst}:5300", message).payload + BEHIND)
    if family == 4:
        data[2:4] = len(data).to_bytes(2, "big")
        data[10:12] = b"\0\0"
        data[10:12] = internet_checksum(bytes(data[:20])).to_bytes(2, "big")
    else:
        data[4:6] = (len(data) - 40).to_bytes(2, "big")
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    with socket.socket(kind, socket.SOCK_RAW, socket.IPPROTO_RAW) as end:
        end.sendto(data, (HOSTS[family][1], 0))


@pytest.mark.parametrize("family", [4, 6])
def test_bytes_behind_a_datagram_hide_no_message(pair: tuple[Namespace, Namespace], tmp_path: Path, family: int) -> None:
    server, client = pair
    seen = tmp_path / "seen"
    with open(seen, "wb") as output:
        server.start(sys.executable, "-u", "-c", RECEIVER, stdout=output)
    until(lambda: "ready" in seen.read_text(), "the receiver listens")
    denied, allowed = dns_query("a.bad.test"), dns_query("a.good.test")
    client.call(send, family, denied)
    until(lambda: denied.hex() in seen.read_text().split(), "the kernel delivers the datagram without them")

    agent = Agent(server, tmp_path, CONFIG).ready()
    already = seen.read_text().split().count(denied.hex())
    client.call(send, family, denied)
    client.call(send, family, allowed)
    # The queue keeps their order: by then the first was judged.
    until(lambda: allowed.hex() in seen.read_text().split(), "what is allowed arrives")
    assert seen.read_text().split().count(denied.hex()) == already == 1
    assert agent.stop() == 0
