"""The real crew: real queues and processes pass the contract of the fake that the supervisor is tested with."""

from __future__ import annotations

import os
import selectors
from collections.abc import Callable

import pytest
from crew_contract import CONTRACT, Fault, World, config_for
from namespace import Namespace

from nfq_agent.host.users import User
from nfq_agent.log import Log, LogEvent
from nfq_agent.queue.queue import Queue
from nfq_agent.service.crew import Crew
from nfq_agent.service.queue_worker import QueueWorker
from nfq_agent.service.system import Workers
from nfq_agent.service.worker import Worker

pytestmark = pytest.mark.kernel


class RealWorld:
    """To be made inside a namespace. What the workers log is printed with a failure."""

    def __init__(self) -> None:
        self._taken: list[Queue] = []
        self.crew: Workers = Crew(selectors.EpollSelector(), self._log(), lambda: None)

    @staticmethod
    def _log() -> Log:
        def write(event: LogEvent) -> bool:
            os.write(2, event.message.encode() + b"\n")
            return True

        return Log(write, "info", lambda: 0.0)

    def worker(self, number: int, fault: Fault = "", max_len: int = 100) -> Worker:
        if fault == "open":
            # Another program has bound this queue.
            self._taken.append(Queue(number).open().bind())
        config = config_for(number, fault, max_len)
        return QueueWorker("main", number, config, User(65534, 65534), self._log(), lambda: self.crew.descriptors)

    def serves(self, worker: Worker) -> bool:
        child = worker.child
        return child is not None and child.ready and not child.reap()

    def close(self) -> None:
        self.crew.retire(self.crew.workers)
        for queue in self._taken:
            queue.close()


@pytest.mark.parametrize("promise", CONTRACT)
def test_the_real_crew(netns: Namespace, promise: Callable[[World], None]) -> None:
    def inside() -> None:
        world = RealWorld()
        try:
            promise(world)
        finally:
            world.close()

    netns.call(inside)
