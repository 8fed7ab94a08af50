"""Counters in memory that a child shares."""

from __future__ import annotations

import os

import pytest

from nfq_agent.counters import Counters, Slots


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
