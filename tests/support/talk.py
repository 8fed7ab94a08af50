"""One connection in front of `dpi`, packet by packet."""

from __future__ import annotations

from typing import Any

from openings import client_hello

from nfq_agent.elements.dpi import Dpi
from nfq_agent.flow import Flow
from nfq_agent.packet import Packet
from nfq_agent.testing import Bench, tcp

CLIENT, SERVER = "192.0.2.1:40000", "198.51.100.1:443"

HELLO = client_hello("a.server.test")


class Talk:
    """One connection in front of the element, packet by packet."""

    def __init__(self, bench: Bench | None = None, *, src: str = CLIENT, dst: str = SERVER, isn: int = 1000) -> None:
        self.bench = bench or Bench("dpi")
        self.src, self.dst, self.isn, self.peer = src, dst, isn, 77000
        self.flow: Flow | None = None

    def send(self, packet: Packet) -> None:
        assert self.bench.chain.needs == Dpi.needs
        self.bench.decide(packet)
        self.flow = self.bench.flows.find(packet.headers.five_tuple)
        assert self.flow is not None

    def open(self) -> Talk:
        self.send(tcp(self.src, self.dst, flags="S", seq=self.isn))
        self.send(tcp(self.dst, self.src, flags="SA", seq=self.peer, ack=self.isn + 1))
        self.send(tcp(self.src, self.dst, flags="A", seq=self.isn + 1, ack=self.peer + 1))
        return self

    def say(self, data: bytes, at: int = 0) -> Talk:
        self.send(self.segment(data, at))
        return self

    def segment(self, data: bytes, at: int = 0) -> Packet:
        return tcp(self.src, self.dst, data, seq=self.isn + 1 + at)

    def answer(self, data: bytes, at: int = 0) -> Talk:
        self.send(tcp(self.dst, self.src, data, seq=self.peer + 1 + at))
        return self

    @property
    def facts(self) -> dict[str, Any]:
        assert self.flow is not None
        return self.flow.facts
