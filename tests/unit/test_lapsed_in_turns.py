"""A worker whose packets no element is shown. It remembers the silent connections that its flow table forgets."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from conversations import segment
from flow_judges import elements

from nfq_agent.context import Context
from nfq_agent.counters import Counters
from nfq_agent.element_chain import ElementChain
from nfq_agent.flow_memory import SIZE, FlowMemory
from nfq_agent.flow_table import FlowTable
from nfq_agent.packet import Packet
from nfq_agent.service import packet_loop
from nfq_agent.service.packet_judge import WorkerSettings
from nfq_agent.service.packet_loop import WorkerLoop
from nfq_agent.service.turn_policy import BUDGET
from nfq_agent.verdict import ACCEPT, DROP, Verdict

SERVER = bytes((198, 51, 100, 1)), 8080
_SYN, _ACK, _PSH = 2, 16, 8
# More than the table has room for until they are taken.
SILENT = 10300
JUNK = b"\x17\3\3\0\x20" + bytes(range(32))


def client(number: int) -> tuple[bytes, int]:
    return bytes((192, 0, 2, number >> 12)), 1024 + (number & 4095)


def syn(number: int) -> bytes:
    return segment(client(number), SERVER, _SYN, 7, 0)


def later(number: int, data: bytes = b"") -> bytes:
    return segment(client(number), SERVER, _ACK | (_PSH if data else 0), 8, 71, data)


class FlowQueue:
    """A queue that is read by flows: turns of packets, each with its time; then the supervisor says stop."""

    unanswered = cut = last = 0
    lanes = ()
    may_wait = True
    must_answer_each = False
    first_took = 0.002
    polled = (0, 0, 0.0)

    def __init__(self, turns: Sequence[tuple[float, list[Packet]]], supervisor: socket.socket) -> None:
        self.kernel: Any = self
        self.turns = list(turns)
        self.now = turns[0][0]
        self.supervisor = supervisor
        self.verdicts: list[Verdict] = []
        # How many packets were shown to the elements.
        self.shown = 0

    def start(self, control: int) -> None:
        self.control = control

    def be_patient(self, seconds: float) -> None:
        pass

    def poll_for(self, seconds: float) -> None:
        pass

    def monotonic(self) -> float:
        self.now = self.turns[0][0] if self.turns else self.now
        return self.now

    def wait(self, timeout: float) -> list[int]:
        if self.turns:
            return []
        self.supervisor.send(b"stop\n")
        return [self.control]

    def judge(self, table: Any, ask: Any, now: float, budget: int, each: bool = False) -> tuple[int, list[Any], None]:
        assert isinstance(table, FlowTable)
        _, packets = self.turns.pop(0) if self.turns else (now, [])
        for packet in packets:
            verdict = table.look_up(packet.payload, packet.length, now, packet.checksum_ready)
            if verdict is None:
                self.shown += 1
                verdict = ask(packet)
            self.verdicts.append(verdict)
        return len(packets), [(packet.id, 1, ACCEPT) for packet in packets], None

    def check(self, packet: Packet, verdict: Verdict) -> None:
        pass

    def finish(self) -> None:
        pass

    def drops(self) -> int:
        return 0


def turns(now: float, payloads: Iterable[bytes], first: int) -> list[tuple[float, list[Packet]]]:
    packets = [Packet(payload, id=first + place, checksum_ready=False) for place, payload in enumerate(payloads)]
    return [(now, packets[at : at + BUDGET]) for at in range(0, len(packets), BUDGET)]


def serve(monkeypatch: pytest.MonkeyPatch, memory: FlowMemory, served: list[tuple[float, list[Packet]]]) -> FlowQueue:
    """A worker that serves these turns, and stops."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        queue = FlowQueue(served, ours)
        monkeypatch.setattr(packet_loop, "time", SimpleNamespace(monotonic=queue.monotonic, monotonic_ns=time.monotonic_ns))
        chain = ElementChain(elements(["allow-list"]), ACCEPT, context=Context(flows=memory))
        source: Any = queue
        WorkerLoop(source, chain, WorkerSettings(1, ACCEPT, DROP, False), Counters(), theirs, print, by_flow=source).run()
        assert ours.recv(100) == b"ready\ndone\n"
    return queue


def test_more_are_forgotten_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each new flow makes the table forget two old ones. No element is shown a packet until the silent client says something."""
    silent = [payload for number in range(SILENT) for payload in (syn(number), later(number))]
    new = [syn(number) for number in range(SILENT, SILENT + SILENT // 2)]
    said = [later(number, JUNK) for number in (0, SILENT - 1)]
    served = [*turns(1000.0, silent, 1), *turns(1400.0, new, len(silent) + 1), *turns(1400.0, said, 1 << 20)]
    queue = serve(monkeypatch, FlowMemory(memoryview(bytearray(SIZE)), os.urandom(16)), served)
    assert queue.shown == len(said)
    assert queue.verdicts == [ACCEPT] * (len(silent) + len(new)) + [DROP] * len(said)


def test_what_the_last_turn_has_forgotten_is_known_to_the_next_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = FlowMemory(memoryview(bytearray(SIZE)), os.urandom(16))
    serve(monkeypatch, memory, [*turns(1000.0, [syn(1), later(1)], 1), *turns(1400.0, [syn(2)], 3)])
    queue = serve(monkeypatch, memory, turns(1400.0, [later(1, JUNK)], 1))
    assert queue.verdicts == [DROP]
