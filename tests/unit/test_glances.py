"""How often a reader looks again before it sleeps: a rule of what its looks found, and that a reader keeps to it."""

from __future__ import annotations

import socket
from collections import deque

from hypothesis import given
from hypothesis import strategies as st
from queue_messages import ACCEPT_MESSAGE, Inbox, drained, message

from nfq_agent.host.nfqueue.flow_inbox import glances_of

LOOKS = 12
WEIGHED = 16


def attempts(found: list[bool]) -> list[int]:
    """The sleeps without a look before each attempt."""
    rests: list[int] = []
    rested = 0
    for looks in glances_of(found):
        if looks:
            rests.append(rested)
        rested = 0 if looks else rested + 1
    return rests


def test_it_continues_while_half_of_the_attempts_find_a_packet() -> None:
    assert glances_of([number % 2 == 0 for number in range(1000)]) == [LOOKS] * 1000
    almost = [number < WEIGHED // 2 - 1 for number in range(WEIGHED)]
    assert glances_of([*almost, True]) == [LOOKS] * WEIGHED + [0] * 32 + [LOOKS]


def test_it_rests_twice_as_long_each_time_that_nothing_is_found_up_to_a_bound() -> None:
    rests = [rest for rest in attempts([False] * (10 * WEIGHED)) if rest]
    assert rests == [32, 64, 128, 256, 512, 1024, 2048, 2048, 2048]


def test_what_paid_makes_the_next_rest_short_again() -> None:
    found = [False] * (4 * WEIGHED) + [True] * WEIGHED + [False] * (WEIGHED + 1)
    assert [rest for rest in attempts(found) if rest] == [32, 64, 128, 256, 32]


@given(st.lists(st.booleans(), max_size=200))
def test_it_looks_in_each_attempt_and_rests_no_longer_than_the_bound(found: list[bool]) -> None:
    rests = attempts(found)
    assert len(rests) == len(found)
    assert all(rest in (0, *(32 << power for power in range(7))) for rest in rests)
    # All that it weighs is WEIGHED attempts at a time.
    assert all(rest == 0 or number % WEIGHED == 0 for number, rest in enumerate(rests))


def test_a_reader_for_which_nothing_comes_stops_looking(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, _ = ends
    # Nothing comes any more, and nothing is waited for.
    ours.shutdown(socket.SHUT_RD)
    inbox = Inbox(ours.fileno(), 4096)
    for number in range(WEIGHED):
        assert inbox.glance == {"tried": number, "found": 0, "rests": 0, "rested": 0}
        assert inbox.skim_each(10, deque(), ACCEPT_MESSAGE, 1, 0.0) == (0, 0, 0)
    for rests in range(32, 0, -1):
        assert inbox.glance == {"tried": 0, "found": 0, "rests": rests, "rested": 32}
        assert inbox.skim_each(10, deque(), ACCEPT_MESSAGE, 1, 0.0) == (0, 0, 0)
    assert inbox.polls == 0


def test_packets_that_are_there_are_not_looked_for(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    inbox = Inbox(ours.fileno(), 4096)
    for number in range(5 * WEIGHED):
        theirs.send(message(b"x", number + 1))
        assert inbox.skim_each(1, deque(), ACCEPT_MESSAGE, 1, 0.0) == (1, number + 1, number + 1)
        assert len(drained(theirs)) == 1
    assert inbox.glance == {"tried": 0, "found": 0, "rests": 0, "rested": 0}


def test_a_reader_that_polls_does_not_look_besides(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, _ = ends
    ours.shutdown(socket.SHUT_RD)
    inbox = Inbox(ours.fileno(), 4096)
    for _ in range(WEIGHED):
        assert inbox.skim_each(10, deque(), ACCEPT_MESSAGE, 1, 0.0001) == (0, 0, 0)
    assert inbox.polls == WEIGHED
    assert inbox.glance["tried"] == 0
