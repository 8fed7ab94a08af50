"""What a crew does, whichever it is: the fake one of the unit tests and the real one pass the same functions (CONTRACT)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal, Protocol

import pytest

from nfq_agent.config.models import Config
from nfq_agent.rules.model import RuleError
from nfq_agent.service.system import FAILURES, Workers
from nfq_agent.service.worker import Worker

Fault = Literal["", "open", "ready"]
# The element raises before the worker serves (support/broken_element.py).
BROKEN: Final = {"elements": ["broken_element:Broken"]}


class World(Protocol):
    """A crew and where its workers live."""

    crew: Workers

    def worker(self, number: int, fault: Fault = "", max_len: int = 100) -> Worker:
        """A worker of this queue number, that fails when it is opened, or before it serves."""

    def serves(self, worker: Worker) -> bool:
        """Whether its process serves."""


def config_for(number: int, fault: Fault, max_len: int) -> Config:
    """One queue."""
    queue = {"num": number, "max_len": max_len, **(BROKEN if fault == "ready" else {})}
    return Config.model_validate({"queue": {"main": queue}})


def they_serve_when_they_are_added(world: World) -> None:
    first, second = world.worker(1), world.worker(2)
    world.crew.add([first, second])
    assert world.crew.queues == {1: first, 2: second}
    assert world.crew.workers == [first, second]
    assert world.serves(first)
    assert world.serves(second)


def none_is_left_when_one_cannot_be_opened(world: World) -> None:
    fine = world.worker(1)
    with pytest.raises(FAILURES):
        world.crew.add([fine, world.worker(2, "open")])
    assert world.crew.workers == []
    assert not world.serves(fine)
    # And what it had opened is free again.
    again = world.worker(1)
    world.crew.add([again])
    assert world.serves(again)


def none_is_left_when_one_does_not_get_ready(world: World) -> None:
    before, fine = world.worker(3), world.worker(1)
    world.crew.add([before])
    with pytest.raises(FAILURES):
        world.crew.add([fine, world.worker(2, "ready")])
    assert world.crew.workers == [before]
    assert world.serves(before)
    assert not world.serves(fine)


def none_is_left_when_what_is_done_meanwhile_fails(world: World) -> None:
    before, fine = world.worker(3), world.worker(1)
    world.crew.add([before])

    def fail() -> None:
        assert world.crew.workers == [before]
        raise RuleError("on purpose")

    with pytest.raises(RuleError, match="on purpose"):
        world.crew.add([fine], fail)
    assert world.crew.workers == [before]
    assert world.serves(before)
    assert not world.serves(fine)
    again = world.worker(1)
    done: list[bool] = []
    world.crew.add([again], lambda: done.append(world.serves(again)))
    # Once, before it is ready.
    assert done == [False]
    assert world.serves(again)


def a_successor_serves_in_its_place(world: World) -> None:
    old, successor = world.worker(1), world.worker(1, max_len=200)
    world.crew.add([old])
    world.crew.replace(old, successor)
    assert world.crew.queues == {1: successor}
    assert world.serves(successor)
    assert not world.serves(old)
    # As the undo of a reload does it.
    world.crew.replace(successor, old)
    assert world.crew.queues == {1: old}
    assert world.serves(old)


def the_old_one_serves_when_its_successor_does_not(world: World) -> None:
    old = world.worker(1)
    world.crew.add([old])
    with pytest.raises(FAILURES):
        world.crew.replace(old, world.worker(1, "ready"))
    assert world.crew.queues == {1: old}
    assert world.serves(old)


def who_is_retired_is_gone(world: World) -> None:
    first, second = world.worker(1), world.worker(2)
    world.crew.add([first, second])
    world.crew.retire([first])
    assert world.crew.queues == {2: second}
    assert not world.serves(first)
    assert world.serves(second)
    world.crew.retire(world.crew.workers)
    world.crew.wait_for_leaving()
    assert world.crew.workers == []


CONTRACT: Final[tuple[Callable[[World], None], ...]] = (
    they_serve_when_they_are_added,
    none_is_left_when_one_cannot_be_opened,
    none_is_left_when_one_does_not_get_ready,
    none_is_left_when_what_is_done_meanwhile_fails,
    a_successor_serves_in_its_place,
    the_old_one_serves_when_its_successor_does_not,
    who_is_retired_is_gone,
)
