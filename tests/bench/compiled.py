"""What a packet costs in CPU with one element: shown to Python as before there were compiled forms, and in its compiled form.

No kernel: messages of 64 UDP flows come through a pair of sockets, thread time, both ways in turn, the least of seven rounds.
Run: .venv/bin/python tests/bench/compiled.py
"""

from __future__ import annotations

import socket
import struct
import time
from collections import deque
from typing import Any, Final

from nfq_agent.counters import Counters
from nfq_agent.element_chain import ElementChain
from nfq_agent.elements import packet_element
from nfq_agent.host.attributes import attribute
from nfq_agent.host.nfqueue.channel import make_packet
from nfq_agent.host.nfqueue.flow_inbox import FlowInbox
from nfq_agent.host.nfqueue.messages import MSG_PACKET
from nfq_agent.service.packet_judge import PacketJudge, WorkerSettings
from nfq_agent.testing import udp
from nfq_agent.verdict import ACCEPT, DROP

ELEMENTS: Final[list[tuple[str, dict[str, Any]]]] = [
    ("log", {"per_second": 1000}),
    ("rate-limit", {"rate": "1000000/s"}),
    ("sample", {"one_in": 1_000_000}),
    ("sample", {"probability": 0.0, "rest": "accept"}),
    ("sample", {"probability": 0.0, "per_flow": True}),
    ("syn-monitor", {}),
]
# Messages that the pair of sockets holds at once, and how often it is filled.
TURN: Final = 128
TURNS: Final = 40
ROUNDS: Final = 7


def messages() -> list[bytes]:
    """A packet of each flow, twice, as the kernel writes it."""
    found = []
    for number in range(TURN):
        packet = udp(f"192.0.2.1:{1000 + number % 64}", "198.51.100.1:9", bytes(22))
        body = attribute(1, number.to_bytes(4, "big") + b"\x08\0\3") + attribute(10, packet.payload)
        found.append(struct.pack("=IHHIIBBH", 20 + len(body), MSG_PACKET, 0, 0, 0, 2, 0, 0) + body)
    return found


class Worker:
    """The reader and the judge of one element, or of none."""

    def __init__(self, kind: str, table: dict[str, Any]) -> None:
        cls = packet_element(kind)
        self.chain = ElementChain([cls(kind, cls.Options.from_table(table), lambda *_, **__: None)], ACCEPT)
        settings = WorkerSettings(1, ACCEPT, DROP, monitor=False)
        self.judge = PacketJudge(self.chain, settings, Counters(), lambda *_, **__: None, lambda *_: None)
        self.steps = self.judge.compile_chain()
        self.ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for end in self.ends:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.inbox = FlowInbox(self.ends[0].fileno(), 4096, make_packet)

    def shown(self) -> int:
        """Read what waits, and judge each packet in Python. Returns how many."""
        packets = self.inbox.read(TURN, deque())
        answers = [(packet, self.judge.verdict(packet)) for packet in packets]
        if self.chain.listens:
            for packet, verdict in answers:
                self.judge.judged(packet, verdict)
        return len(packets)

    def compiled(self) -> int:
        """Read what waits, and judge it by the steps."""
        assert self.steps is not None
        count = self.inbox.judge(TURN, deque(), self.steps, 1.0, self.judge.verdict)[0]
        for packet, verdict, which in self.steps.take_heard():
            self.judge.tell(packet, verdict, which)
        return count

    def bare(self) -> int:
        """Read what waits without looking at it, as bare accept does."""
        return self.inbox.skim(TURN, deque())[0]

    def spend(self, way: str, waiting: list[bytes]) -> float:
        """Microseconds for each packet."""
        turn, spent = getattr(self, way), 0.0
        for _ in range(TURNS):
            for message in waiting:
                self.ends[1].send(message)
            begin = time.thread_time()
            count = turn()
            spent += time.thread_time() - begin
            assert count == TURN
        return spent * 1e6 / (TURNS * TURN)


def main() -> None:
    """All of them."""
    waiting = messages()
    for kind, table in ELEMENTS:
        worker = Worker(kind, table)
        least: dict[str, float] = {}
        for _ in range(ROUNDS):
            for way in ("bare", "shown", "compiled"):
                least[way] = min(least.get(way, 1e9), worker.spend(way, waiting))
        print(f"{kind} {table}: " + ", ".join(f"{way} {micros:.2f} us" for way, micros in least.items()))


if __name__ == "__main__":
    main()
