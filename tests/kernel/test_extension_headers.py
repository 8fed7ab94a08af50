"""A header policy sees the ports behind any legal chain of IPv6 extension headers, and gives on_error for what it cannot read."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from agent import Agent, until
from namespace import Namespace
from scapy.layers.inet import UDP
from scapy.layers.inet6 import HBHOptUnknown, IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrHopByHop
from scapy.packet import Packet as Layers

pytestmark = pytest.mark.kernel
CONFIG = """
[queue.q]
num = 9
on_error = "{on_error}"
elements = ["deny"]
[element.deny]
type = "policy"
default = "accept"
rule = [{{ action = "drop", dport = 53 }}]
[rules.r]
queue = "q"
hooks = ["input"]
all = true
"""


def options(size: int) -> list[Layers]:
    """Options that fill a header up to `size` bytes: of a type that receivers skip (RFC 8200 4.2), 257 bytes each at most."""
    left = size - 2
    found: list[Layers] = []
    while left > 0:
        part = min(left, 257)
        part -= left - part == 1
        found.append(HBHOptUnknown(otype=0x1E, optdata=bytes(part - 2)))
        left -= part
    return found


def send(headers: list[tuple[str, int]], port: int) -> None:
    """A UDP datagram behind these extension headers, from a raw socket."""
    packet: Layers = IPv6(src="fd00:203::2", dst="fd00:203::1")
    for kind, size in headers:
        packet /= (IPv6ExtHdrHopByHop if kind == "hop" else IPv6ExtHdrDestOpt)(options=options(size))
    data = bytes(packet / UDP(sport=4000, dport=port) / b"hello")
    with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW) as end:
        end.sendto(data, ("fd00:203::1", 0))


@pytest.mark.parametrize(
    "headers", [[("dest", 120)], [("dest", 1024)], [("hop", 1024), ("dest", 2040), ("dest", 2040)]], ids=["120", "1024", "chain"]
)
def test_ports_behind_extension_headers(
    pair: tuple[Namespace, Namespace], tmp_path: Path, headers: list[tuple[str, int]]
) -> None:
    server, client = pair
    for namespace in pair:
        namespace.run("ip", "link", "set", "mtu", "9000", "dev", "eth0")
    agent = Agent(server, tmp_path, CONFIG.format(on_error="accept")).ready()
    before = agent.totals("q")
    client.call(send, headers, 53)
    until(lambda: agent.totals("q")["dropped"] > before["dropped"], "it was dropped by its port")
    assert agent.totals("q")["malformed"] == 0
    assert agent.stop() == 0
