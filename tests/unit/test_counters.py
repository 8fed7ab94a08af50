"""Counters in memory that a child shares."""

from __future__ import annotations

import os

import pytest

from nfq_agent.counters import Counters, Slots, growth


def test_counters_are_shared_with_a_child_and_have_their_names() -> None:
    counters = Counters()
    child = os.fork()
    if child == 0:
        counters.received += 5
        counters.last_id = 2**64 - 1
        os._exit(0)
    os.waitpid(child, 0)
    assert counters.received == 5
    assert counters.snapshot()["last_id"] == 2**64 - 1
    assert counters.snapshot()["accepted"] == 0
    slots = Slots(["one", "two"])
    slots.set("two", 7)
    assert slots.snapshot() == {"one": 0, "two": 7}
    with pytest.raises(KeyError):
        slots.set("three", 1)


@pytest.mark.parametrize(("count", "before", "grown"), [(7, 3, 4), (3, 3, 0), (2, 3, 2), (0, 3, 0), (5, 0, 5)])
def test_growth_begins_again_where_the_counter_did(count: int, before: int, grown: int) -> None:
    assert growth(count, before) == grown


def test_numbers_of_another_layout_go_on_by_their_names() -> None:
    slots = Slots(["one", "two"])
    slots.set("two", 7)
    slots.become({"one": 5, "gone": 9})
    assert slots.snapshot() == {"one": 5, "two": 7}


def test_memory_that_was_given_holds_the_numbers_already() -> None:
    memory = memoryview(bytearray(16))
    Slots(["one", "two"], memory).set("two", 7)
    assert memory.tobytes() == bytes(8) + (7).to_bytes(8, "little")
    assert Slots(["one", "two"], memory).snapshot() == {"one": 0, "two": 7}


def test_a_line_that_was_not_written_is_counted_once() -> None:
    counters = Counters()
    counters.suppress()
    counters.suppress()
    assert counters.log_suppressed == 2
