"""The turns of the compiled reader: when a turn ends, by count, time, signal or error."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections import deque

import pytest
from queue_messages import ACCEPT_MESSAGE, Inbox, drained, message, set_patience

from nfq_agent.host.nfqueue import inbox as compiled
from nfq_agent.packet import Packet
from nfq_agent.verdict import ACCEPT, DROP, Verdict


def test_runs_and_the_budget(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    inbox = Inbox(ours.fileno(), 4096)
    known: dict[bytes, Verdict] = {}

    def decide(packet: Packet, key: bytes | None) -> Verdict:
        return DROP if b"drop" in packet.payload else ACCEPT

    for identity, text in enumerate([b"a", b"drop", b"drop", b"b", b"c"], 0xFFFFFFFD):
        theirs.send(message(text, identity & 0xFFFFFFFF))
    # Numbers continue from the end at the beginning.
    assert inbox.sort(4, deque(), known, decide) == (
        4,
        0xFFFFFFFD,
        [(0xFFFFFFFD, 1, ACCEPT), (0xFFFFFFFF, 2, DROP), (0, 1, ACCEPT)],
    )
    assert inbox.sort(4, deque(), known, decide) == (1, 1, [(1, 1, ACCEPT)])
    assert inbox.sort(4, deque(), known, decide) == (0, 0, [])
    for identity in (3, 4, 5):
        theirs.send(message(b"", identity))
    # What was read before comes first.
    pending = deque([message(b"", 1), message(b"", 2)])
    assert inbox.skim(4, pending) == (4, 1, 4)
    assert not pending
    assert inbox.skim(4, pending) == (1, 5, 5)
    assert inbox.skim(4, pending) == (0, 0, 0)


def test_reading_takes_what_waits_up_to_the_budget(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    inbox = Inbox(ours.fileno(), 4096)
    for number in range(3, 6):
        theirs.send(message(b"%d" % number, number))
    theirs.send(message(b"", kind=2))
    pending = deque([message(b"1", 1), message(b"2", 2)])
    assert [(packet.id, packet.payload) for packet in inbox.read(4, pending)] == [
        (number, b"%d" % number) for number in range(1, 5)
    ]
    assert not pending
    assert [packet.id for packet in inbox.read(4, pending)] == [5]
    assert (inbox.count, inbox.latest) == (1, 5)
    assert inbox.read(4, pending) == []
    assert inbox.count == 0


def test_a_turn_that_an_exception_ends_says_what_it_took(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends

    def make(identity: int, *_: object) -> Packet:
        if identity == 8:
            raise KeyboardInterrupt
        return Packet(b"", id=identity)

    inbox = compiled.Inbox(ours.fileno(), 4096, make)
    for number in (7, 8, 9):
        theirs.send(message(b"", number))
    with pytest.raises(KeyboardInterrupt):
        inbox.read(10, deque())
    assert (inbox.count, inbox.latest) == (2, 8)
    assert [packet.id for packet in inbox.read(10, deque())] == [9]


@pytest.mark.parametrize("spin", [0.0, 1.0])
@pytest.mark.parametrize("together", [1, 64])
def test_a_turn_ends_though_packets_keep_coming(ends: tuple[socket.socket, socket.socket], spin: float, together: int) -> None:
    ours, theirs = ends
    theirs.setblocking(False)
    set_patience(ours, 0.9)
    inbox = Inbox(ours.fileno(), 4096)
    over = threading.Event()

    def keep_coming() -> None:
        stop = time.monotonic() + 30
        while not over.is_set() and time.monotonic() < stop:
            # Several at once, always as many.
            for _ in range(4):
                theirs.send(message(b"x"))
            time.sleep(0.002)
            drained(theirs)

    allowed = os.sched_getaffinity(0)
    # On one processor, so that they are there when the reader wakes.
    os.sched_setaffinity(0, {min(allowed)})
    thread = threading.Thread(target=keep_coming)
    begin = time.monotonic()
    thread.start()
    try:
        count, _, _ = inbox.skim_each(1 << 30, deque(), ACCEPT_MESSAGE, together, spin)
        took = time.monotonic() - begin
    finally:
        over.set()
        thread.join()
        os.sched_setaffinity(0, allowed)
    assert count > 0
    # 50 ms, and a wait; not as long as they come.
    assert took < 15


def test_a_turn_ends_when_much_was_asked(ends: tuple[socket.socket, socket.socket]) -> None:
    """What is asked may be slow, and nothing is answered before the end of the turn."""
    ours, theirs = ends
    inbox = Inbox(ours.fileno(), 4096)
    for number in range(60):
        theirs.send(message(b"x", 240 + number))
    pending = deque(message(b"x", number) for number in range(240))
    counts = [inbox.sort(1000, pending, {}, lambda packet, key: ACCEPT)[0] for _ in range(3)]
    assert counts == [256, 44, 0]


def test_a_signal_ends_the_wait(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, _ = ends
    set_patience(ours, 60)
    came: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: came.append(number))
    timer = threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    try:
        timer.start()
        begin = time.monotonic()
        assert Inbox(ours.fileno(), 4096).skim_each(10, deque(), ACCEPT_MESSAGE, 1, 0.0) == (0, 0, 0)
        assert came == [signal.SIGUSR1]
        assert time.monotonic() - begin < 50
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)


def test_the_kernels_errors_come_out(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    set_patience(ours, 0.02)
    inbox = Inbox(ours.fileno(), 4096)
    theirs.send(message(b"x", 1))
    theirs.shutdown(socket.SHUT_RD)
    with pytest.raises(BrokenPipeError):
        inbox.skim_each(10, deque(), ACCEPT_MESSAGE, 1, 0.0)
    ours.close()
    for look in (
        lambda: inbox.skim(1, deque()),
        lambda: inbox.read(1, deque()),
        lambda: inbox.sort(1, deque(), {}, lambda packet, key: ACCEPT),
        lambda: inbox.skim_each(1, deque(), ACCEPT_MESSAGE, 1, 0.0),
        lambda: inbox.skim_each(1, deque(), ACCEPT_MESSAGE, 64, 0.1),
    ):
        with pytest.raises(OSError, match="Bad file descriptor"):
            look()
