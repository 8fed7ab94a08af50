"""Taking over what other processes serve. The predecessors are real processes; the workers that follow note what is done."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
from store_contract import FakeKeeper

from nfq_agent.host.child import DONE, READY, STOP, Child
from nfq_agent.log import Log
from nfq_agent.service import handover
from nfq_agent.service.order import Order
from nfq_agent.service.queue_worker import QueueWorker
from nfq_agent.service.store import Store
from nfq_agent.service.worker import WorkerError

Life = Callable[[socket.socket], None]


def obedient(control: socket.socket) -> None:
    """It has answered all that it read when it is told to stop."""
    control.sendall(READY)
    while STOP not in control.recv(64):
        pass
    control.sendall(DONE)


def deaf(control: socket.socket) -> None:
    """It does not stop: what it had read is not known."""
    control.sendall(READY)
    time.sleep(60)


def gone(control: socket.socket) -> None:
    """It ends without a word when it is told to stop."""
    control.sendall(READY)
    control.recv(64)


def lingering(control: socket.socket) -> None:
    """It has answered all that it read, and does not end."""
    obedient(control)
    time.sleep(60)


class NextWorker:
    """What a handover needs of a queue's worker; `told` is what it did with it, over all workers in order."""

    def __init__(self, number: int, told: list[str], life: Life | None = None, fits: bool = True, fails: bool = False) -> None:
        self.number, self.title, self.told, self.fits, self.fails = number, f"worker of queue {number}", told, fits, fails
        self.predecessor = None if life is None else Child(self.title, life)
        if self.predecessor is not None:
            self.predecessor.wait_ready(10)
        self.waits = False
        self.child: Child | None = None
        self.noted: dict[str, dict[str, Any]] = {f"queue-{number}": {"settings": number}}
        self.stored: dict[str, tuple[int, bool]] = {}

    def _note(self, what: str) -> None:
        self.told.append(f"{what} {self.number}")

    def start(self) -> None:
        self._note("start waiting" if self.waits else "start")

    def wait_ready(self, beat: Callable[[], None]) -> None:
        beat()
        if self.fails:
            raise WorkerError(f"{self.title} did not become ready within 10 s")
        self._note("ready")

    def count_on(self) -> None:
        self._note("count on")

    def begin(self, order: Order) -> None:
        self._note(f"begin {order.line.decode().split()[0]}")

    @property
    def control(self) -> NextWorker:
        return self

    def keep_beside(self, store: Store, child: Child | None) -> None:
        self._note("keep beside")

    def keep_alone(self, store: Store) -> None:
        self._note("keep alone")

    def lost(self, requeue: bool) -> Order:
        return Order(7, requeue)

    def take_lost(self) -> None:
        self._note("take lost")

    def refit(self) -> None:
        self._note("refit")

    def stop(self) -> None:
        self._note("stop")


class World:
    """A store, a log, and the workers of one handover."""

    def __init__(self) -> None:
        self.store = Store({}, FakeKeeper())
        self.lines: list[str] = []
        self.told: list[str] = []
        self.workers: list[NextWorker] = []
        self.log = cast("Log", lambda message, level="info", **_: self.lines.append(f"{level}: {message}"))

    def add(self, number: int, life: Life | None = None, **how: bool) -> NextWorker:
        self.workers.append(NextWorker(number, self.told, life, **how))
        return self.workers[-1]

    def hand_over(self) -> None:
        handover.hand_over(cast("list[QueueWorker]", self.workers), self.store, self.log, lambda: None)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    # Long for what comes sooner or later; a test that waits in vain makes it short.
    monkeypatch.setattr(handover, "_STOPS_WITHIN", 60.0)
    monkeypatch.setattr(handover, "_ENDS_WITHIN", 60.0)
    made = World()
    yield made
    for worker in made.workers:
        if worker.predecessor is not None:
            worker.predecessor.kill()
            worker.predecessor.reap(block=True)


def test_without_a_predecessor_the_worker_takes_what_may_be_lost(world: World) -> None:
    world.add(1)
    world.hand_over()
    assert world.told == ["start waiting 1", "ready 1", "keep beside 1", "count on 1", "begin lost 1", "keep alone 1"]
    assert world.store.noted("queue-1") == {"settings": 1}


def test_a_predecessor_that_has_answered_all_leaves_nothing_to_take(world: World) -> None:
    pid = cast("Child", world.add(1, obedient).predecessor).pid
    world.hand_over()
    assert world.told == ["start waiting 1", "ready 1", "keep beside 1", "count on 1", "begin go 1", "keep alone 1"]
    assert world.workers[0].predecessor is None
    assert not os.path.exists(f"/proc/{pid}")


def test_a_predecessor_that_is_done_and_does_not_end_is_killed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "_ENDS_WITHIN", 0.3)
    pid = cast("Child", world.add(1, lingering).predecessor).pid
    world.hand_over()
    assert world.told[-2:] == ["begin go 1", "keep alone 1"]
    assert not os.path.exists(f"/proc/{pid}")


@pytest.mark.parametrize(("life", "lines"), [(deaf, 1), (gone, 0)])
def test_what_a_predecessor_left_is_taken_after_its_end(
    world: World, monkeypatch: pytest.MonkeyPatch, life: Life, lines: int
) -> None:
    if life is deaf:
        monkeypatch.setattr(handover, "_STOPS_WITHIN", 0.3)
    pid = cast("Child", world.add(1, life).predecessor).pid
    world.hand_over()
    assert world.told[-2:] == ["begin lost 1", "keep alone 1"]
    assert not os.path.exists(f"/proc/{pid}")
    assert world.lines == ["warning: worker of queue 1 of the previous agent did not stop within 0.3 s and is killed"] * lines


def test_no_predecessor_is_stopped_before_all_successors_are_ready(world: World) -> None:
    world.add(1, obedient)
    world.add(2, obedient)
    world.hand_over()
    assert world.told[:4] == ["start waiting 1", "start waiting 2", "ready 1", "ready 2"]


def test_one_that_cannot_be_prepared_leaves_every_predecessor_serving(world: World) -> None:
    first = world.add(1, obedient)
    world.add(2, obedient, fails=True)
    with pytest.raises(WorkerError, match="worker of queue 2 did not become ready"):
        world.hand_over()
    assert world.told[-2:] == ["stop 2", "stop 1"]
    assert not [line for line in world.told if line.startswith("begin")]
    for worker in (first, world.workers[1]):
        predecessor = cast("Child", worker.predecessor)
        # It was told nothing, and waits for words.
        assert not select.select([predecessor.pidfd], [], [], 0.1)[0]


@pytest.mark.parametrize(("life", "takes"), [(obedient, False), (deaf, True), (gone, True), (None, True)])
def test_a_queue_whose_settings_change_has_no_reader_meanwhile(
    world: World, monkeypatch: pytest.MonkeyPatch, life: Life | None, takes: bool
) -> None:
    if life is deaf:
        monkeypatch.setattr(handover, "_STOPS_WITHIN", 0.3)
    world.add(1, life, fits=False)
    world.hand_over()
    taken = ["take lost 1"] if takes else []
    assert world.told == [*taken, "count on 1", "refit 1", "start 1", "ready 1"]
    assert world.store.noted("queue-1") == {"settings": 1}
    assert world.workers[0].predecessor is None


def test_those_that_change_come_last(world: World) -> None:
    world.add(1, obedient, fits=False)
    world.add(2, obedient)
    world.hand_over()
    assert world.told.index("begin go 2") < world.told.index("refit 1")


def test_a_service_manager_that_keeps_nothing_is_reported_and_the_worker_serves(world: World) -> None:
    class Refusing(FakeKeeper):
        def keep(self, name: str, descriptor: int, polled: bool) -> None:
            raise OSError("no room")

    world.store = Store({}, Refusing())
    reader, writer = os.pipe()
    world.add(1).stored = {"queue-1": (reader, False)}
    world.hand_over()
    assert world.told[-2:] == ["begin lost 1", "keep alone 1"]
    assert "error: worker of queue 1: the service manager does not keep it: no room; a restart will lose packets" in world.lines
    os.close(reader)
    os.close(writer)
