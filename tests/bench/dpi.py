"""What the identification of a TLS flow costs in CPU, with dpkt and scapy beside it. Run: .venv/bin/python tests/bench/dpi.py

A flow is SYN, SYN and ACK, ACK, and the hello that OpenSSL sends. Ours: headers, flow table, element, with name, ALPN,
version, JA3 and JA4. Theirs: headers and the name alone, which is less. The goal is 60 microseconds a flow.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import dpkt
from scapy.layers.inet import IP
from scapy.layers.tls.all import TLS
from scapy.layers.tls.extensions import TLS_Ext_ServerName

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))

from openings import client_hello

from nfq_agent.elements.dpi import Dpi, DpiOptions
from nfq_agent.flow_table import FlowTable
from nfq_agent.packet import Packet
from nfq_agent.testing import tcp

FLOWS = 2000
ROUNDS = 5
GOAL = 60.0
NAME = "www.example.com"


def flows(count: int, pieces: int) -> list[list[bytes]]:
    """The packets of each flow, the hello in so many segments."""
    hello = client_hello(NAME, alpn=("h2", "http/1.1"))
    step = -(-len(hello) // pieces)
    made = []
    for number in range(count):
        src, dst = f"10.{number >> 8}.{number & 255}.1:40000", "198.51.100.1:443"
        packets = [
            tcp(src, dst, flags="S", seq=7),
            tcp(dst, src, flags="SA", seq=70, ack=8),
            tcp(src, dst, flags="A", seq=8, ack=71),
        ]
        packets += [tcp(src, dst, hello[at : at + step], seq=8 + at, ack=71) for at in range(0, len(hello), step)]
        made.append([packet.payload for packet in packets])
    return made


def ours(made: list[list[bytes]]) -> int:
    """How many were named."""
    element = Dpi("dpi", DpiOptions(), lambda *_, **__: None)
    table = FlowTable()
    named = 0
    for packets in made:
        for data in packets:
            packet = Packet(data, time=1.0)
            flow = table.observe(packet.headers.five_tuple, 1.0)
            element.decide(packet, flow)
        named += flow.facts.get("tls_sni") == NAME
    return named


def with_dpkt(made: list[list[bytes]]) -> int:
    """Headers and the name."""
    named = 0
    for packets in made:
        for data in packets:
            segment = dpkt.ip.IP(data).data
            if not segment.data:
                continue
            for record in dpkt.ssl.tls_multi_factory(segment.data)[0]:
                hello = dpkt.ssl.TLSHandshake(record.data).data
                for kind, value in hello.extensions:
                    if kind == 0:
                        named += value[5:] == NAME.encode()
    return named


def with_scapy(made: list[list[bytes]]) -> int:
    """Headers and the name."""
    named = 0
    for packets in made:
        for data in packets:
            packet = IP(data)
            payload = bytes(packet["TCP"].payload)
            if payload:
                for extension in TLS(payload).msg[0].ext:
                    if isinstance(extension, TLS_Ext_ServerName):
                        named += extension.servernames[0].servername == NAME.encode()
    return named


def cost(identify: Callable[[list[list[bytes]]], int], made: list[list[bytes]], times: int = ROUNDS) -> float:
    """Microseconds of CPU a flow: the median of the rounds."""
    rounds = []
    for _ in range(times):
        begin = time.process_time()
        named = identify(made)
        rounds.append((time.process_time() - begin) / len(made) * 1e6)
        assert named == len(made), f"{identify.__name__} named {named} of {len(made)}"
    return median(rounds)


def main() -> int:
    """Print the figures; 1 if the goal is missed."""
    one = flows(FLOWS, 1)
    figure = cost(ours, one)
    print(f"ours, hello in one segment      {figure:8.1f} us a flow (goal {GOAL:.0f})")
    print(f"ours, hello in three segments   {cost(ours, flows(FLOWS, 3)):8.1f} us a flow")
    print(f"dpkt, the name alone            {cost(with_dpkt, one):8.1f} us a flow")
    print(f"scapy, the name alone           {cost(with_scapy, one[:100]):8.1f} us a flow")
    return 0 if figure <= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
