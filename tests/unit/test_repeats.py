"""The bound on REPEAT: the same bytes a few times at once, other bytes always, and memory that does not grow."""

from __future__ import annotations

from nfq_agent.packet import Hook, Packet
from nfq_agent.repeats import MOST, RepeatBound


def packet(number: int = 0, hook: Hook = Hook.OUTPUT) -> Packet:
    return Packet(number.to_bytes(20, "big"), hook=hook)


def test_the_same_packet_is_repeated_a_few_times_and_no_more() -> None:
    bound = RepeatBound()
    assert [bound.allows(packet(), now=1.0) for _ in range(MOST + 3)] == [True] * MOST + [False] * 3


def test_others_and_other_hooks_are_not_affected() -> None:
    bound = RepeatBound()
    for _ in range(MOST):
        bound.allows(packet(), 1.0)
    assert bound.allows(packet(1), 1.0)
    assert bound.allows(packet(hook=Hook.INPUT), 1.0)
    assert not bound.allows(packet(), 1.0)


def test_equal_packets_that_come_later_are_new_ones() -> None:
    bound = RepeatBound()
    for second in range(10 * MOST):
        assert bound.allows(packet(), 2.0 * second)


def test_what_is_remembered_is_bounded() -> None:
    bound = RepeatBound()
    for _ in range(MOST):
        bound.allows(packet(), 1.0)
    for number in range(1, 2000):
        bound.allows(packet(number), 1.0)
    assert bound.allows(packet(), 1.0)


def test_a_packet_that_changes_each_time_is_known_again() -> None:
    bound = RepeatBound()
    allowed = [bound.allows(packet(number), 1.0, packet(number + 1).payload) for number in range(MOST + 1)]
    assert allowed == [True] * MOST + [False]
    # It was not sent again, so it does not come back.
    assert bound.allows(packet(MOST + 1), 1.0)
