"""The control socket of a queue's process in the store, at whatever point of a hand-over the previous agent was killed."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator

import pytest
from store_contract import FakeKeeper

from nfq_agent.host.child import READY, STOP, Child
from nfq_agent.service.store import Store
from nfq_agent.service.stored_control import StoredControl


def serves(control: socket.socket) -> None:
    """Until it is told to stop, or its control socket is closed."""
    control.sendall(READY)
    while (said := control.recv(64)) and STOP not in said:
        pass


@pytest.fixture
def child() -> Iterator[Callable[[], Child]]:
    made: list[Child] = []

    def make() -> Child:
        made.append(Child("a worker", serves))
        made[-1].wait_ready(60)
        return made[-1]

    yield make
    for each in made:
        each.kill()
        each.reap(block=True)


# The points at which the agent is killed: what was done by then, and which of the two processes serves.
POINTS = ("before", "kept beside", "noted", "kept alone", "all")


@pytest.mark.parametrize("point", POINTS)
def test_the_process_that_serves_is_adopted_wherever_the_agent_is_killed(child: Callable[[], Child], point: str) -> None:
    keeper = FakeKeeper()
    store = Store({}, keeper)
    control, old, new = StoredControl(3), child(), child()
    done = POINTS.index(point)
    store.note("queue-3", {"process": old.identity, **control.noted})
    store.put("worker-3", old.control.fileno(), True)
    if done >= 1:
        control.keep_beside(store, new)
    if done >= 2:
        store.note("queue-3", {"process": new.identity, **control.noted})
    if done >= 3:
        control.keep_alone(store)
        store.put("worker-3", new.control.fileno(), True)
    if done >= 4:
        store.note("queue-3", {"process": new.identity, **control.noted})
    # What the service manager hands over.
    handed = {name: os.dup(copies[-1]) for name, copies in keeper.kept.items()}
    after = Store(handed, keeper)
    next_control = StoredControl(3)
    found = next_control.adopt(after, "a worker")
    assert found is not None
    served, other = (old, new) if done < 2 else (new, old)
    assert found.pid == served.pid
    found.tell(STOP)
    assert served.wait_end(60)
    assert not other.wait_end(0)
    # As after a hand-over that was finished: one name, and a note that says so.
    assert [name for name in keeper.kept if name.startswith(("worker-", "coming-"))] == ["worker-3"]
    assert after.noted("queue-3")["control"] == "worker-3"
    # With both ends closed here and in the store, the other one would end: nothing else has it.
    found.leave()


def test_without_a_note_there_is_nothing_to_adopt() -> None:
    assert StoredControl(3).adopt(Store({}, FakeKeeper()), "a worker") is None
