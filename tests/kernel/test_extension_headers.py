"""A header policy sees the ports behind any legal chain of IPv6 extension headers, and gives on_error for what it cannot read."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
from agent import Agent, until
from namespace import Namespace
from scapy.layers.inet import UDP
from scapy.layers.inet6 import (
    HBHOptUnknown,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
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
    send_raw(data)


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


def chain(kind: str, port: int) -> bytes:
    """A UDP datagram with headers before its ports that a receiver passes over."""
    start: Layers = IPv6(src="fd00:203::2", dst="fd00:203::1")
    end: Layers = UDP(sport=4000, dport=port) / b"hello"
    if kind == "atomic-fragment":
        return bytes(start / IPv6ExtHdrFragment(id=7) / end)
    if kind == "routing":
        return bytes(start / IPv6ExtHdrRouting(type=0, segleft=0, addresses=["fd00:203::1"]) / end)
    whole = start
    for _ in range(12):
        whole /= IPv6ExtHdrDestOpt(options=options(6))
    return bytes(whole / end)


# Writes the port of each datagram that arrives.
RECEIVER = """
import select, socket, sys
ends = {}
for port in (53, 54):
    end = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    end.bind(("::", port))
    ends[end] = port
print("ready", flush=True)
while True:
    for end in select.select(list(ends), [], [])[0]:
        end.recv(100)
        print(ends[end], flush=True)
"""


def send_raw(packet: bytes) -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW) as end:
        end.sendto(packet, ("fd00:203::1", 0))


@pytest.mark.parametrize("kind", ["atomic-fragment", "routing", "many"])
@pytest.mark.parametrize("listed", ["denied", "allowed"])
def test_no_chain_of_headers_brings_a_denied_port_past_a_policy(
    pair: tuple[Namespace, Namespace], tmp_path: Path, kind: str, listed: str
) -> None:
    server, client = pair
    seen = tmp_path / "seen"
    with open(seen, "wb") as output:
        server.start(sys.executable, "-u", "-c", RECEIVER, stdout=output)
    until(lambda: "ready" in seen.read_text(), "the receiver listens")
    config = CONFIG.format(on_error="drop")
    if listed == "allowed":
        config = config.replace('default = "accept"', 'default = "drop"').replace('"drop", dport = 53', '"accept", dport = 54')
    agent = Agent(server, tmp_path, config).ready()
    for port in (53, 54):
        client.call(send_raw, chain(kind, port))
    # The queue keeps their order: by then the one to port 53 was judged.
    until(lambda: "54" in seen.read_text().split(), "the datagram to the port that is allowed arrives")
    assert "53" not in seen.read_text().split()
    assert agent.stop() == 0
