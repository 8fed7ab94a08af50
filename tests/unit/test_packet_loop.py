"""The worker's loop over a source of packets that is not a kernel queue, and over one that is; no root, no kernel."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from failing import Fails, Said

from nfq_agent.answering import Answering
from nfq_agent.counters import Counters
from nfq_agent.element import PacketElement
from nfq_agent.element_chain import ElementChain
from nfq_agent.elements.record import FlowRecord, RecordOptions
from nfq_agent.flow import Flow
from nfq_agent.latency import NANOSECONDS, Latency
from nfq_agent.packet import Packet
from nfq_agent.service import turn_policy
from nfq_agent.service.packet_judge import WorkerSettings
from nfq_agent.service.packet_loop import WorkerLoop
from nfq_agent.service.packet_source import KernelQueue, PacketSource
from nfq_agent.service.turn_policy import PATIENCE
from nfq_agent.verdict import ACCEPT, DROP, Action, Verdict


def udp(sport: int, identity: int = 1) -> Packet:
    """A datagram from this port."""
    header = b"\x45\0\0\x1c\0\0\x40\0\x40\x11\0\0" + bytes((10, 0, 0, 1, 10, 0, 0, 2))
    return Packet(header + sport.to_bytes(2, "big") + b"\0\x35\0\x08\0\0", id=identity)


class Source:
    """Packets of a list; then the supervisor says stop."""

    kernel: KernelQueue | None = None
    unanswered = 0

    def __init__(self, turns: Sequence[list[Packet]], supervisor: socket.socket) -> None:
        self.turns = list(turns)
        self.supervisor = supervisor
        self.verdicts: list[tuple[int, Verdict]] = []
        self.waits: list[float] = []
        self.reads = 0
        self.finished = False

    def start(self, control: int) -> None:
        self.control = control

    def wait(self, timeout: float) -> list[int]:
        self.waits.append(timeout)
        if self.turns or timeout == 0.0:
            return []
        self.supervisor.send(b"stop\n")
        return [self.control]

    def read(self, budget: int) -> list[Packet]:
        self.reads += 1
        return self.turns.pop(0) if self.turns else []

    def check(self, packet: Packet, verdict: Verdict) -> None:
        pass

    def answer(self, answers: Sequence[tuple[Packet, Verdict]]) -> None:
        assert not self.finished
        self.verdicts += [(packet.id, verdict) for packet, verdict in answers]

    def verdict(self, packet: Packet, verdict: Verdict) -> None:
        self.answer([(packet, verdict)])

    def finish(self) -> None:
        self.finished = True

    def drops(self) -> int:
        return 0


class Queue(Source):
    """A kernel queue: its turns are known five-tuples and unknown ones."""

    last = 0
    cut = 0
    may_wait = True
    lanes = ()
    first_took = 0.002
    polled = (0, 0, 0.0)

    def __init__(self, turns: Sequence[list[Packet]], supervisor: socket.socket) -> None:
        super().__init__(turns, supervisor)
        self.kernel: KernelQueue = self
        self.patience: float | None = None
        self.polls: list[float] = []
        self.most_known = 0

    def be_patient(self, seconds: float) -> None:
        self.patience = seconds

    def poll_for(self, seconds: float) -> None:
        self.polls.append(seconds)

    def note_flows(self, table: Answering | None, now: float) -> None:
        """This one looks at no message."""

    def skim(self, verdict: Verdict, budget: int) -> int:
        packets = self.read(budget)
        self.answer([(packet, verdict) for packet in packets])
        return len(packets)

    def skim_each(self, verdict: Verdict, budget: int) -> int:
        return self.skim(verdict, budget)

    def sort(
        self,
        known: dict[bytes, Verdict],
        decide: Callable[[Packet, bytes | None], Verdict],
        budget: int,
        each: bool = False,
    ) -> tuple[int, list[tuple[int, int, Verdict]]]:
        runs = []
        for packet in self.read(budget):
            key = packet.payload
            verdict = known[key] if key in known else decide(packet, key)
            self.verdicts.append((packet.id, verdict))
            runs.append((packet.id, 1, verdict))
        self.most_known = max(self.most_known, len(known))
        return len(runs), runs

    def answer_lost(self, below: int, verdict: Verdict) -> None:
        raise AssertionError("no predecessor")


class Late(PacketElement):
    """Every verdict much later."""

    def decide(self, packet: Packet, flow: Flow | None) -> Verdict:
        return Verdict(Action.ACCEPT, mark=packet.id, delay=3600.0)


class Odd(PacketElement):
    """Drops packets from odd ports."""

    pure = True

    def decide(self, packet: Packet, flow: Flow | None) -> Verdict:
        sport = packet.headers.five_tuple.sport
        return DROP if sport is not None and sport % 2 else ACCEPT


def serve(kind: type[Source], turns: Sequence[list[Packet]], *elements: type[PacketElement], **settings: Any) -> Any:
    """Serve these turns until the end; the source with what it was given."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(5)
        source = kind(turns, ours)
        chain = ElementChain([element(element.__name__, None, print) for element in elements], ACCEPT)
        counters, latency = Counters(), Latency()
        made: PacketSource = source
        WorkerLoop(
            made, chain, WorkerSettings(1, ACCEPT, DROP, False, **settings), counters, theirs, print, latency=latency
        ).run()
        assert ours.recv(100) == b"ready\ndone\n"
        assert source.finished
        assert counters.received == sum(map(len, turns))
        measured = latency.snapshot()
        assert measured.pop(NANOSECONDS) > 0
        assert sum(measured.values()) == sum(1 for turn in turns if turn)
    return source


@pytest.mark.parametrize("kind", [Source, Queue])
def test_delayed_verdicts_are_given_at_the_end(kind: type[Source]) -> None:
    source = serve(kind, [[udp(1, 1), udp(1, 2)], [udp(1, 3)]], Late)
    given = [(number, verdict) for number, verdict in source.verdicts if verdict.action is not Action.RETAIN]
    assert given == [(number, Verdict(Action.ACCEPT, mark=number)) for number in (1, 2, 3)]


@pytest.mark.parametrize("kind", [Source, Queue])
@pytest.mark.parametrize("elements", [(), (Odd,)])
def test_every_packet_gets_its_verdict(kind: type[Source], elements: tuple[type[PacketElement], ...]) -> None:
    turns = [[udp(port, port) for port in range(1, 6)], [], [udp(port, 10 + port) for port in range(3, 9)]]
    source = serve(kind, turns, *elements)
    wanted = [(packet.id, DROP if elements and packet.payload[21] % 2 else ACCEPT) for turn in turns for packet in turn]
    assert source.verdicts == wanted


def test_remembered_verdicts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    bound, turn = 4096, 256
    assert turn_policy.REMEMBERED == 65536
    monkeypatch.setattr(turn_policy, "REMEMBERED", bound)
    turns = [[udp(port, port)] for port in range(200)]
    turns += [[udp(port, port) for port in range(at, at + turn)] for at in range(200, 200 + 3 * bound, turn)]
    source = serve(Queue, turns, Odd)
    # A turn asks about a bounded number more.
    assert bound <= source.most_known < bound + turn


def test_busy_polling_is_passed_on_to_the_turns_that_wait() -> None:
    # The time is fixed: it is set once.
    for seconds in (0.02, 0.0):
        queue = serve(Queue, [[udp(1)]], busy_poll=seconds)
        assert (queue.patience, queue.polls) == (PATIENCE, [seconds])


def test_busy_polling_looks_again_and_again_before_it_sleeps() -> None:
    polled = serve(Source, [[udp(1)]], busy_poll=0.3)
    slept = serve(Source, [[udp(1)]])
    assert slept.reads == 2
    assert polled.reads > slept.reads


def test_what_fails_while_the_worker_stops_is_logged_and_keeps_no_record_from_being_made() -> None:
    said, counters = Said(), Counters()
    ours, theirs = socket.socketpair()
    elements = [Fails("broken", None, said), FlowRecord("record", RecordOptions(per_second=0), said)]
    with ours, theirs:
        theirs.settimeout(5)
        source = Source([[udp(port, port) for port in range(1, 4)]], ours)
        WorkerLoop(source, ElementChain(elements, ACCEPT), WorkerSettings(1, ACCEPT, DROP, False), counters, theirs, said).run()
        assert ours.recv(100) == b"ready\ndone\n"
    assert [line.end for line in said.where(event="end")] == ["stopped"] * 3
    (first, *others) = said.where(level="error", element="broken")
    assert "element broken failed" in first.text
    assert "failing.py:" in first.text
    # Each is counted, and so is what was left out: once at each flow's end, once at its own, and when it was told the time.
    assert counters.errors >= 5
    (left_out,) = said.where(level="warning")
    assert 1 + len(others) + sum(vars(line).get("suppressed", 0) for line in (first, *others, left_out)) == counters.errors
    assert counters.log_suppressed == counters.errors - 1 - len(others)
