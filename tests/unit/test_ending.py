"""When a process of a proxy ends, by its control words and the time. No socket, no clock."""

from __future__ import annotations

import math

import pytest

from nfq_agent.host.child import DRAIN, LEAVE, STOP
from nfq_agent.proxy.ending import Ending


def test_without_a_word_it_serves() -> None:
    ending = Ending(10.0)
    ending.look(1e9, empty=True)
    assert (ending.over, ending.draining, ending.begins, ending.due) == (False, False, False, None)


def test_stop_ends_at_once() -> None:
    ending = Ending(10.0)
    ending.on_control(STOP, 0.0)
    assert ending.over


@pytest.mark.parametrize(("word", "due"), [(DRAIN, 110.0), (LEAVE, math.inf)])
def test_draining_accepts_the_backlog_and_ends_by_the_time(word: bytes, due: float) -> None:
    ending = Ending(10.0)
    ending.on_control(word, 90.0)
    assert ending.begins
    ending.begun(100.0, empty=False)
    assert not ending.begins
    assert ending.due == due
    ending.look(109.9, empty=False)
    assert not ending.over
    ending.look(110.0, empty=False)
    assert ending.over == (word == DRAIN)


def test_draining_ends_with_the_last_connection() -> None:
    ending = Ending(10.0)
    ending.on_control(DRAIN, 0.0)
    ending.begun(0.0, empty=False)
    ending.look(1.0, empty=True)
    assert ending.over


def test_draining_without_a_connection_ends_once_the_backlog_is_empty() -> None:
    ending = Ending(10.0)
    ending.on_control(DRAIN, 0.0)
    ending.begun(0.0, empty=True)
    assert ending.over


def test_a_drain_after_a_leave_shortens_it_and_a_later_one_does_not_lengthen_it() -> None:
    ending = Ending(10.0)
    ending.on_control(LEAVE, 0.0)
    ending.begun(0.0, empty=False)
    ending.on_control(DRAIN, 50.0)
    assert ending.due == 60.0
    ending.on_control(DRAIN, 55.0)
    assert ending.due == 60.0


def test_stop_outweighs_drain_in_one_read() -> None:
    ending = Ending(10.0)
    ending.on_control(DRAIN + STOP, 0.0)
    assert ending.over
