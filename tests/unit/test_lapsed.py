"""Connections that the flow table forgets before their client says anything: they are judged as if it had not."""

from __future__ import annotations

import os

import pytest
from flow_judges import judge
from tcp_openings import found

from nfq_agent.context import Context
from nfq_agent.flow_memory import SIZE, FlowMemory
from nfq_agent.flow_table import FlowTable
from nfq_agent.openings import Openings
from nfq_agent.packet import Packet
from nfq_agent.testing import tcp, udp
from nfq_agent.verdict import ACCEPT, DROP, Verdict

CLIENT, SERVER = "192.0.2.1:40000", "198.51.100.1:8080"
GOOD = b"GET / HTTP/1.1\r\nHost: a.good.test\r\n\r\n"
BAD = GOOD.replace(b"good", b"bad")
# As only some servers read it.
ODD = BAD.replace(b"HTTP/1.1", b"HTTP/1.2")
JUNK = b"\x17\3\3\0\x20" + bytes(range(32))
# And which policies let it pass.
SAID = {
    "junk": (JUNK, ("block-list",)), "good": (GOOD, ("allow-list", "block-list")), "bad": (BAD, ()), "odd": (ODD, ()),
}  # fmt: skip


class Host:
    """A judge, with the compiled flow table in front of it or without."""

    def __init__(self, policy: str, compiled: bool, memory: FlowMemory | None = None) -> None:
        self.memory = memory or FlowMemory(memoryview(bytearray(SIZE)), os.urandom(16))
        self._judge = judge([policy], context=Context(flows=self.memory))
        self._table = self._judge.settle_flows() if compiled else None
        self.now = 1000.0

    def stop(self) -> FlowMemory:
        """The worker ends in order. Returns what the next one gets, where the agent continues."""
        self._judge.keep_silent()
        return self.memory

    def verdict(self, packet: Packet) -> Verdict:
        self._judge.now = self.now
        if isinstance(self._table, FlowTable):
            said = found(self._table, packet, self.now)
            if said is not None:
                return said
        return self._judge.verdict(packet)

    def open(self, client: str = CLIENT, answered: bool = True) -> None:
        self.verdict(tcp(client, SERVER, flags="S", seq=7))
        if answered:
            self.verdict(tcp(SERVER, client, flags="SA", seq=70, ack=8))
        self.verdict(tcp(client, SERVER, flags="A", seq=8, ack=71))

    def be_silent(self) -> None:
        """For so long that new flows make the table forget what there was."""
        self.now += 310
        for port in range(50000, 50004):
            self.open(f"192.0.2.1:{port}")

    def say(self, data: bytes, at: int = 0) -> Verdict:
        return self.verdict(tcp(CLIENT, SERVER, data, seq=8 + at, ack=71))


@pytest.mark.parametrize("compiled", [False, True], ids=["shown", "compiled"])
@pytest.mark.parametrize("answered", [False, True], ids=["one-way", "both-ways"])
@pytest.mark.parametrize("policy", ["allow-list", "block-list"])
@pytest.mark.parametrize("said", SAID)
def test_it_is_judged_by_what_it_says_then(policy: str, said: str, answered: bool, compiled: bool) -> None:
    data, allowed = SAID[said]
    verdict = ACCEPT if policy in allowed else DROP
    host = Host(policy, compiled)
    host.open(answered=answered)
    host.be_silent()
    # The kernel's own probe, which says nothing.
    assert host.verdict(tcp(CLIENT, SERVER, flags="A", seq=7, ack=71)) == ACCEPT
    assert host.say(data) == verdict
    assert host.say(b"more", len(data)) == verdict


@pytest.mark.parametrize("compiled", [False, True], ids=["shown", "compiled"])
def test_silence_within_a_message_hides_its_name(compiled: bool) -> None:
    host = Host("block-list", compiled)
    host.open()
    assert host.say(BAD[:30]) == ACCEPT
    host.be_silent()
    assert host.say(BAD[30:], 30) == DROP


@pytest.mark.parametrize("compiled", [False, True], ids=["shown", "compiled"])
def test_silence_twice(compiled: bool) -> None:
    host = Host("allow-list", compiled)
    host.open()
    for _ in range(2):
        host.be_silent()
        # The kernel's own probe, which says nothing.
        assert host.verdict(tcp(CLIENT, SERVER, flags="A", seq=7, ack=71)) == ACCEPT
    assert host.say(JUNK) == DROP


@pytest.mark.parametrize("compiled", [False, True], ids=["shown", "compiled"])
@pytest.mark.parametrize("restart", [False, True], ids=["reload", "restart"])
@pytest.mark.parametrize("said", SAID)
def test_the_next_worker_knows_that_nothing_was_said(compiled: bool, restart: bool, said: str) -> None:
    data, allowed = SAID[said]
    first = Host("allow-list", compiled)
    first.open()
    memory = first.stop()
    second = Host("allow-list", compiled, FlowMemory(memory.room, os.urandom(16)) if restart else memory)
    assert second.say(data) == (ACCEPT if "allow-list" in allowed else DROP)


def test_what_was_said_while_no_agent_ran_is_not_known() -> None:
    first = Host("allow-list", compiled=False)
    first.open()
    second = Host("allow-list", False, FlowMemory(first.stop().room, os.urandom(16)))
    assert second.say(JUNK, 100) == ACCEPT


def test_what_began_before_the_agent_is_still_told_apart() -> None:
    host = Host("allow-list", compiled=False)
    assert host.say(JUNK) == ACCEPT


@pytest.mark.parametrize("packet", [tcp("192.0.2.2:40000", SERVER, flags="S"), udp("192.0.2.2:40000", SERVER, JUNK)], ids=repr)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_without_memory_to_forget_a_flow_the_packet_is_shown(monkeypatch: pytest.MonkeyPatch, packet: Packet) -> None:
    table = FlowTable(limit=1)
    table.judge_openings(Openings(lambda *_: (b"", ()), (), (53,), None, patience=(9, 9000)))
    table.lapsed = []
    begins = [tcp(CLIENT, SERVER, flags="S", seq=7), tcp(SERVER, CLIENT, flags="SA", seq=70, ack=8)]
    assert [found(table, each) for each in begins] == [ACCEPT, ACCEPT]

    def refuse(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("nfq_agent.flow_table.Flow", refuse)
    for _ in range(3):
        assert found(table, packet) is None
    # Nothing is lost of the flow that was to make room.
    assert found(table, begins[0]) is ACCEPT
    monkeypatch.undo()
    assert found(table, packet) is ACCEPT
    assert [each.origin.src for each in table.lapsed] == [bytes((192, 0, 2, 1))]
    assert len(table) == 1
