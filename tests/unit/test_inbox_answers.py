"""The answers of the compiled reader: each packet gets its own verdict, once and in order."""

from __future__ import annotations

import socket
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st
from queue_messages import ACCEPT_MESSAGE, Inbox, drained, message, set_patience, sorted_out

from nfq_agent.host.nfqueue.messages import SLICE, slices
from nfq_agent.packet import Packet
from nfq_agent.verdict import ACCEPT, DROP, Verdict


def verdict(number: int, batch: bool = False) -> bytes:
    """The same for this packet, or for all up to it."""
    return ACCEPT_MESSAGE[:4] + (b"\3\3" if batch else b"\1\3") + ACCEPT_MESSAGE[6:28] + number.to_bytes(4, "big")


def _from_port(port: int) -> bytes:
    """A plain packet whose verdict may be known; without ports where it is 0."""
    protocol = b"\x11" if port else b"\x01"
    return b"\x45\0\0\x40\0\0\x40\0\x40" + protocol + b"\0\0" + bytes(10) + port.to_bytes(2, "big") + bytes(8)


@pytest.mark.parametrize("waits", [False, True])
def test_five_tuples_in_the_same_place_have_their_own_verdicts(ends: tuple[socket.socket, socket.socket], waits: bool) -> None:
    """There are 64 places, chosen by a hash: with 200 five-tuples most places are shared by several."""
    ours, theirs = ends
    set_patience(ours, 0.001)
    inbox = Inbox(ours.fileno(), 4096)
    accepted = [message(_from_port(port)) for port in range(1, 201, 2)]
    known = {key: ACCEPT for _, key in sorted_out(*accepted)[1] if key is not None}
    dropped: list[int] = []

    def decide(packet: Packet, key: bytes | None) -> Verdict:
        dropped.append(packet.id)
        return DROP

    for port in range(2, 201, 2):
        # Every place holds an accepted five-tuple when the one that is not known comes.
        theirs.send(message(_from_port(port), port))
        if waits:
            pending = deque(accepted)
            for _ in range(50):
                # A turn ends in time, also on a machine that is busy with others: the packet then comes with the next.
                inbox.sort_each(101, pending, known, decide, ACCEPT_MESSAGE, ACCEPT, lambda number, verdict: None, 64, 0.0)
                if dropped and dropped[-1] == port:
                    break
        else:
            inbox.sort(101, deque(accepted), known, decide)
        if port not in dropped:
            # The turn was over by its time before it came to the last packet.
            inbox.sort(1, deque(), known, decide)
        drained(theirs)
    assert dropped == list(range(2, 201, 2))


@pytest.mark.parametrize("spin", [0.0, 0.02])
def test_each_is_answered_with_its_own_number(ends: tuple[socket.socket, socket.socket], spin: float) -> None:
    ours, theirs = ends
    set_patience(ours, 0.02)
    inbox = Inbox(ours.fileno(), 4096)
    others: list[tuple[int, Verdict]] = []

    def decide(packet: Packet, key: bytes | None) -> Verdict:
        return DROP if b"drop" in packet.payload else ACCEPT

    for identity in (7, 0x01020304, 9):
        theirs.send(message(b"x", identity))
    theirs.send(message(b"x", kind=2))
    assert inbox.skim_each(10, deque([message(b"", 6)]), ACCEPT_MESSAGE, 1, spin) == (4, 6, 9)
    numbers = [6, 7, 0x01020304, 9]
    assert [theirs.recv(64) for _ in numbers] == [verdict(number) for number in numbers]
    for identity, text in ((10, b"x"), (11, b"drop"), (12, b"x")):
        theirs.send(message(text, identity))
    count, first, runs = inbox.sort_each(
        10, deque(), {}, decide, ACCEPT_MESSAGE, ACCEPT, lambda number, verdict: others.append((number, verdict)), 1, spin
    )
    assert (count, first) == (3, 10)
    assert runs == [(10, 1, ACCEPT), (11, 1, DROP), (12, 1, ACCEPT)]
    assert [theirs.recv(64)[28:] for _ in range(2)] == [b"\0\0\0\x0a", b"\0\0\0\x0c"]
    assert others == [(11, DROP)]


@pytest.mark.parametrize("spin", [0.0, 0.02])
def test_what_is_there_at_once_is_answered_at_once(ends: tuple[socket.socket, socket.socket], spin: float) -> None:
    ours, theirs = ends
    set_patience(ours, 0.02)
    inbox = Inbox(ours.fileno(), 4096)

    def answers(numbers: range) -> list[bytes]:
        for number in numbers:
            theirs.send(message(b"x", number))
        assert inbox.skim_each(100, deque(), ACCEPT_MESSAGE, 3, spin) == (len(numbers), numbers[0], numbers[-1])
        return drained(theirs)

    assert answers(range(5)) == [verdict(2, batch=True), verdict(4, batch=True)]
    assert answers(range(5, 6)) == [verdict(5)]
    # After one that was alone, 16 are answered without a look at whether there are more.
    assert answers(range(6, 6 + 20)) == [*(verdict(number) for number in range(6, 22)), verdict(24, batch=True), verdict(25)]


def test_what_is_known_is_answered_at_once_and_in_order(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    set_patience(ours, 0.02)
    inbox = Inbox(ours.fileno(), 4096)
    said: list[bytes | int] = []

    def answer(number: int, other: Verdict) -> None:
        # The kernel's side has what was answered before.
        said.extend(drained(theirs))
        if other is DROP:
            said.append(number)

    _, asked = sorted_out(message(_from_port(1)), message(_from_port(2)))
    known = {key: verdict for (_, key), verdict in zip(asked, (ACCEPT, DROP), strict=True) if key is not None}
    for number, port in enumerate((1, 1, 1, 2, 1, 1, 3, 1, 1, 1)):
        theirs.send(message(_from_port(port), number))

    def decide(packet: Packet, key: bytes | None) -> Verdict:
        assert key is not None
        # A place that is remembered must not outlive what it points to.
        known[key] = ACCEPT
        return ACCEPT

    count, first, runs = inbox.sort_each(100, deque(), known, decide, ACCEPT_MESSAGE, ACCEPT, answer, 64, 0.0)
    answer(-1, ACCEPT)
    assert (count, first) == (10, 0)
    assert runs == [(2, 3, ACCEPT), (3, 1, DROP), (9, 6, ACCEPT)]
    assert said == [
        verdict(0), verdict(2, batch=True), 3, verdict(4), verdict(5), verdict(6), verdict(7), verdict(9, batch=True)
    ]  # fmt: skip
    # The same without waiting.
    for number, port in enumerate((1, 1, 2, 2, 1, 3, 1)):
        theirs.send(message(_from_port(port), number))
    assert inbox.sort(100, deque(), known, decide) == (7, 0, [(1, 2, ACCEPT), (3, 2, DROP), (6, 3, ACCEPT)])


@given(
    st.lists(st.sampled_from([0, 1, 1, 1, 2, 2, 3, 4, 5]), min_size=1, max_size=40),
    st.integers(0, 3),
    st.integers(1, 5),
    st.integers(1, 50),
    st.booleans(),
)
def test_each_gets_its_verdict_once(ports: list[int], before: int, together: int, budget: int, waits: bool) -> None:
    """Whatever is known, and whatever is answered together: judged by what the kernel does with each message."""
    wanted = {0: ACCEPT, 1: ACCEPT, 2: DROP, 3: ACCEPT, 4: DROP, 5: ACCEPT}
    _, asked = sorted_out(message(_from_port(1)), message(_from_port(2)), message(_from_port(3)))
    known = {key: wanted[port] for port, (_, key) in enumerate(asked, 1) if key is not None}
    # Numbers continue from the end at the beginning.
    numbers = [(0xFFFFFFF0 + place) & 0xFFFFFFFF for place in range(len(ports))]
    waiting = dict(enumerate(ports))
    got: dict[int, Verdict] = {}

    def give(number: int, verdict: Verdict, batch: bool = False) -> None:
        place = numbers.index(number)
        assert place in waiting, "answered twice"
        for other in [other for other in waiting if other == place or (batch and other < place)]:
            del waiting[other]
            got[other] = verdict

    def read() -> None:
        for data in drained(theirs):
            give(int.from_bytes(data[28:], "big"), ACCEPT, batch=data[4:6] == b"\3\3")

    def answer(number: int, verdict: Verdict) -> None:
        read()
        give(number, verdict)

    def decide(packet: Packet, key: bytes | None) -> Verdict:
        verdict = wanted[ports[numbers.index(packet.id)]]
        if key is not None and verdict is ACCEPT:
            known[key] = verdict
        return verdict

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        theirs.setblocking(False)
        set_patience(ours, 0.0005)
        inbox = Inbox(ours.fileno(), 4096)
        messages = [message(_from_port(port), number) for port, number in zip(ports, numbers, strict=True)]
        pending = deque(messages[:before])
        for data in messages[before:]:
            theirs.send(data)
        total = 0
        while True:
            if waits:
                count, _, runs = inbox.sort_each(budget, pending, known, decide, ACCEPT_MESSAGE, ACCEPT, answer, together, 0.0)
                read()
            else:
                count, _, runs = inbox.sort(budget, pending, known, decide)
                for last, number, verdict in runs:
                    give(last, verdict, batch=number > 1)
            assert count <= budget
            verdicts = [verdict for _, number, verdict in runs for _ in range(number)]
            assert verdicts == [wanted[port] for port in ports[total : total + count]]
            if count == 0:
                break
            total += count
    assert total == len(ports)
    assert got == {place: wanted[port] for place, port in enumerate(ports)}


def test_a_verdict_message_has_its_size(ends: tuple[socket.socket, socket.socket]) -> None:
    inbox = Inbox(ends[0].fileno(), 4096)
    for wrong in (b"", bytes(31), bytes(65)):
        with pytest.raises(ValueError, match="not a verdict message"):
            inbox.skim_each(1, deque(), wrong, 1, 0.0)


@given(st.integers(0, 2**32 - 1), st.integers(1, 3 * SLICE + 2))
def test_a_long_run_is_answered_inslices(last: int, count: int) -> None:
    ends = [*slices(last, count), last]
    begin = last - count
    for end in ends:
        # Numbers begin again after 2**32 - 1.
        assert 0 < (end - begin) & 0xFFFFFFFF <= SLICE
        begin = end
    assert len(ends) == -(-count // SLICE)
