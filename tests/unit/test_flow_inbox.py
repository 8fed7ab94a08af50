"""The reader by flows: each packet is taken once and gets one verdict, and what is answered as it comes has its own number."""

from __future__ import annotations

import socket
from collections import deque
from struct import Struct

import pytest

from nfq_agent.flow import Watch
from nfq_agent.flow_table import FlowTable
from nfq_agent.host.attributes import attribute
from nfq_agent.host.nfqueue.channel import make_packet
from nfq_agent.host.nfqueue.flow_inbox import FlowInbox
from nfq_agent.host.nfqueue.messages import MSG_PACKET, MSG_VERDICT, MSG_VERDICT_BATCH, VerdictMessages
from nfq_agent.packet import Packet
from nfq_agent.step_chain import Steps
from nfq_agent.steps import Die, LineLimit, OpeningHeard
from nfq_agent.testing import tcp, udp
from nfq_agent.verdict import ACCEPT, DROP, RETAIN, WOULD_DROP, Action, Verdict


def message(packet: Packet, identity: int) -> bytes:
    """As the kernel writes it."""
    body = attribute(1, identity.to_bytes(4, "big") + b"\x08\0\3") + attribute(10, packet.payload)
    return Struct("=IHHIIBBH").pack(20 + len(body), MSG_PACKET, 0, 0, 0, 2, 0, 0) + body


class Flows:
    """Asked about the first packet of a flow, and every later one from a port that is watched."""

    def __init__(self, verdicts: dict[int, Verdict], watched: int = 0) -> None:
        self.table = FlowTable()
        self.verdicts = verdicts
        self.watched = watched
        self.asked: list[int] = []
        self.sockets = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, Struct("ll").pack(0, 50_000))
        self.sockets[1].settimeout(5)
        self.inbox = FlowInbox(self.sockets[0].fileno(), 4096, make_packet)

    def ask(self, packet: Packet) -> Verdict:
        self.asked.append(packet.id)
        five_tuple = packet.headers.five_tuple
        assert five_tuple.sport is not None
        flow = self.table.observe(five_tuple, 1.0)
        verdict = self.verdicts[five_tuple.sport]
        watch = Watch.ALL if five_tuple.sport == self.watched else Watch.NOTHING
        if verdict.action is not Action.RETAIN:
            self.table.settle(watch, flow, verdict)
        return verdict

    def send(self, *ports: int, first: int = 1) -> None:
        for identity, port in enumerate(ports, first):
            self.sockets[1].send(message(udp(f"192.0.2.1:{port}", "198.51.100.1:9"), identity & 0xFFFFFFFF))

    def answers(self) -> list[tuple[int, int, int]]:
        """Kind of message, verdict, number of the packet."""
        self.sockets[1].setblocking(False)
        got: list[tuple[int, int, int]] = []
        while True:
            try:
                data = self.sockets[1].recv(256)
            except BlockingIOError:
                return got
            got.append((int.from_bytes(data[4:6], "little"), *Struct("!II").unpack_from(data, 24)))

    def close(self) -> None:
        for end in self.sockets:
            end.close()


@pytest.fixture
def flows() -> Flows:
    return Flows({1: ACCEPT, 2: DROP, 3: Verdict(Action.ACCEPT, mark=5), 4: RETAIN, 5: WOULD_DROP}, watched=3)


def test_a_turn_that_does_not_wait(flows: Flows) -> None:
    flows.send(1, 1, 2, 1, 2, 3, 3, 1)
    pending = deque([message(udp("192.0.2.1:2", "198.51.100.1:9"), 0)])
    count, first, runs, left = flows.inbox.judge(100, pending, flows.table, 1.0, flows.ask)
    marked = flows.verdicts[3]
    assert (count, first, left) == (9, 0, None)
    assert runs == [
        (0, 1, DROP), (2, 2, ACCEPT), (3, 1, DROP), (4, 1, ACCEPT), (5, 1, DROP), (7, 2, marked), (8, 1, ACCEPT)
    ]  # fmt: skip
    # The first packet of each flow, and each of the one that is watched.
    assert flows.asked == [0, 1, 6, 7]
    assert flows.table.find(udp("192.0.2.1:1", "198.51.100.1:9").headers.five_tuple) is not None
    assert flows.inbox.judge(100, deque(), flows.table, 1.0, flows.ask) == (0, 0, [], None)
    flows.close()


def test_a_turn_ends_at_the_budget_and_at_a_verdict_of_its_own_kind(flows: Flows) -> None:
    flows.send(1, 1, 4, 1)
    assert flows.inbox.judge(1, deque(), flows.table, 1.0, flows.ask) == (1, 1, [(1, 1, ACCEPT)], None)
    count, _, runs, left = flows.inbox.judge(100, deque(), flows.table, 1.0, flows.ask)
    assert left is not None
    assert (count, runs, left[0].id, left[1]) == (2, [(2, 1, ACCEPT)], 3, RETAIN)
    assert flows.inbox.judge(100, deque(), flows.table, 1.0, flows.ask)[2] == [(4, 1, ACCEPT)]
    flows.close()


def test_an_accept_in_place_of_a_drop_is_told_apart_and_not_kept(flows: Flows) -> None:
    flows.send(5, 1, 5)
    _, _, runs, _ = flows.inbox.judge(100, deque(), flows.table, 1.0, flows.ask)
    assert [verdict is WOULD_DROP for _, _, verdict in runs] == [True, False, True]
    assert flows.asked == [1, 2, 3]
    flows.close()


@pytest.mark.parametrize("together", [1, 64])
@pytest.mark.parametrize("spin", [0.0, 0.02])
def test_each_is_answered_once(flows: Flows, together: int, spin: float) -> None:
    ports = [1, 1, 2, 2, 1, 3, 1, 1, 1, 2, 5, 1]
    flows.send(*ports)
    single = VerdictMessages(7).single
    runs: list[tuple[int, int, Verdict]] = []
    count = 0
    # A turn ends in time, also on a machine that is busy with others.
    for _ in range(100):
        taken, _, more, left = flows.inbox.judge_each(100, deque(), flows.table, 1.0, flows.ask, single, together, spin)
        assert left is None
        runs += more
        count += taken
        if count == len(ports):
            break
    assert sum(number for _, number, _ in runs) == count == len(ports)
    answered = 0
    for kind, action, identity in flows.answers():
        wanted = range(answered + 1, identity + 1)
        assert wanted
        assert len(wanted) == 1 if kind == MSG_VERDICT else together > 1
        assert kind in (MSG_VERDICT, MSG_VERDICT_BATCH)
        assert {flows.verdicts[ports[number - 1]].code for number in wanted} == {action}
        assert len({flows.verdicts[ports[number - 1]].mark for number in wanted}) == 1
        answered = identity
    assert answered == len(ports)
    flows.close()


def test_an_exception_does_not_hide_what_was_taken(flows: Flows) -> None:
    flows.send(1, 1, 6, 1)
    with pytest.raises(KeyError):
        flows.inbox.judge(100, deque(), flows.table, 1.0, flows.ask)
    assert (flows.inbox.count, flows.inbox.latest) == (3, 3)
    assert flows.inbox.judge(100, deque(), flows.table, 1.0, flows.ask)[2] == [(4, 1, ACCEPT)]
    flows.close()


@pytest.mark.parametrize("each", [False, True])
def test_what_has_to_be_told_is_told_once_with_its_verdict(flows: Flows, each: bool) -> None:
    # A line for the first two packets; the one that cannot be decoded is asked about. One packet in two is dropped.
    line = LineLimit(0.001, 2, drops_only=False, say=lambda _: None)
    steps = Steps([Die(2, bool, by_flow=False, rest="drop"), OpeningHeard(), line], monitor=False)
    sent = [udp(f"192.0.2.1:{port}", "198.51.100.1:9") for port in range(1, 4)]
    sent += [tcp("192.0.2.1:4", "198.51.100.1:9", flags=flags) for flags in ("A", "S", "A", "S")]
    asked: list[int] = []

    def ask(packet: Packet) -> Verdict:
        asked.append(packet.id)
        return DROP

    for number, packet in enumerate(sent, 1):
        flows.sockets[1].send(message(packet, number))
    flows.sockets[1].send(message(Packet(b"\x45"), 8))
    heard: list[tuple[int, Verdict, int]] = []
    runs: list[tuple[int, int, Verdict]] = []
    # Once more when all have their verdict: nothing is told again.
    last = False
    while not last:
        last = sum(count for _, count, _ in runs) >= 8
        if each:
            single = VerdictMessages(7).single
            _, _, more, left = flows.inbox.judge_each(100, deque(), steps, 1.0, ask, single, 64, 0.02)
        else:
            _, _, more, left = flows.inbox.judge(100, deque(), steps, 1.0, ask)
        assert left is None
        runs += more
        heard += [(packet.id, verdict, which) for packet, verdict, which in steps.take_heard()]
    assert asked == [8]
    # Of the chosen ones: the second and the fourth have lines, the sixth is not a SYN; the fifth is one, and not chosen.
    assert heard == [(2, ACCEPT, 4), (4, ACCEPT, 4), (8, DROP, 0)]
    given = {number: verdict for last, count, verdict in runs for number in range(last - count + 1, last + 1)}
    assert [given[number] for number in range(1, 9)] == [DROP, ACCEPT] * 3 + [DROP, DROP]
    if each:
        answers = flows.answers()
        assert answers[-1][2] == 8
        assert sum(1 for _, action, _ in answers if action) >= 3
    flows.close()
