"""Verdict messages in fixed shapes: what arrives is what messages.py made, and nothing else can be sent."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfq_agent.host.jail.fixed import FixedMessages
from nfq_agent.host.nfqueue import messages
from nfq_agent.host.nfqueue.messages import VerdictMessages
from nfq_agent.host.nfqueue.outbox import Cutter, Outbox
from nfq_agent.verdict import Action, Verdict

NUMBER = 777
VERDICTS = [Verdict(Action.ACCEPT), Verdict(Action.DROP), Verdict(Action.ACCEPT, mark=7), Verdict(Action.REPEAT, mark=0xFFFFFFFF)]


class Wire:
    """An outbox on one end of a socket, and what arrives at the other."""

    def __init__(self) -> None:
        self.end, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for each in (self.end, self.far):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.far.setblocking(False)
        self.outbox = Outbox(self.end.fileno(), NUMBER, messages.cutting(NUMBER))

    def arrived(self) -> list[bytes]:
        """What was sent, one entry for each call."""
        found = []
        while True:
            try:
                found.append(self.far.recv(1 << 20))
            except BlockingIOError:
                return found


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    """One for all tests: a region of its own for each would fill the room."""
    made = Wire()
    yield made
    made.end.close()
    made.far.close()


def _one(kind: int, verdict: Verdict, identity: int) -> bytes:
    made = VerdictMessages(NUMBER)
    return made.batch(identity, verdict) if kind else made.single(identity, verdict)


@given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from(VERDICTS), st.integers(0, 0xFFFFFFFF)), max_size=200))
def test_what_is_sent_is_what_was_given(wire: Wire, given_messages: list[tuple[int, Verdict, int]]) -> None:
    data = b"".join(_one(*each) for each in given_messages)
    wire.outbox.send(data)
    assert b"".join(wire.arrived()) == data


def test_neighbours_of_one_shape_go_in_one_call(wire: Wire) -> None:
    wire.outbox.send(b"".join(_one(1, VERDICTS[number % 2], number) for number in range(64)))
    assert len(wire.arrived()) == 1


@pytest.mark.parametrize("length", [1, 2, 3, 4, 20, 191, 192, 193, 1500, 65531])
def test_new_bytes_of_a_packet(wire: Wire, length: int) -> None:
    payload = (bytes(range(256)) * 256)[:length]
    data = VerdictMessages(NUMBER).single(9, Verdict(Action.ACCEPT, mark=1, payload=payload))
    wire.outbox.send(data)
    (arrived,) = wire.arrived()
    # The message is as long as it says, and what was added is an attribute that the kernel passes over.
    assert int.from_bytes(arrived[:4], "little") == len(arrived)
    assert arrived[4 : len(data)] == data[4:]
    rest = arrived[len(data) :]
    assert not rest or (int.from_bytes(rest[:2], "little"), int.from_bytes(rest[2:4], "little")) == (len(rest), 0x3FFF)


BEGIN = bytes.fromhex("14000000 1000 0100 00000000 00000000 0000 000a")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(BEGIN, id="the begin of an nftables batch"),
        pytest.param(messages.message(messages.MSG_CONFIG, 1, NUMBER, messages.bind_command(2, 0), 1), id="unbind the queue"),
        pytest.param(messages.message(messages.MSG_VERDICT, 1, NUMBER, messages.no_packets_verdict()), id="an acknowledged one"),
        pytest.param(b"\x20\0\0\0", id="less than a header"),
        pytest.param(b"\xff\xff\0\0" + bytes(28), id="longer than it is"),
    ],
)
def test_what_is_no_verdict_is_not_sent(wire: Wire, data: bytes) -> None:
    with pytest.raises(ValueError, match=r"message|verdict"):
        wire.outbox.send(data)
    assert wire.arrived() == []


def test_the_number_of_the_queue_is_fixed(wire: Wire) -> None:
    wire.outbox.send(VerdictMessages(1).single(5, VERDICTS[0]))
    assert wire.arrived() == [VerdictMessages(NUMBER).single(5, VERDICTS[0])]


def test_headers_lie_in_a_region_of_their_own() -> None:
    first, second = FixedMessages([[b"a", 2], [3]]), FixedMessages([[b"b"]])
    (start, end, stride), (other, *_) = first.headers, second.headers
    assert 0x10_0000_0000 <= start < end < 0x11_0000_0000
    assert end - start == 2 * stride
    assert other >= end
    with pytest.raises(ValueError, match="does not take"):
        first.send(0, 0, b"abc")


def test_messages_that_do_not_cut_a_packet_are_refused(wire: Wire) -> None:
    for wrong in (b"", messages.cutting(NUMBER)[:60], bytes(200)):
        with pytest.raises(ValueError, match="do not cut"):
            Cutter(wire.end.fileno(), wrong)
