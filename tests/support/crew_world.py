"""The real crew: real processes, for the contract of the fake that the supervisor is tested with."""

from __future__ import annotations

import os
import selectors
import time

from crew_contract import Fault, config_for

from nfq_agent.host.users import CAP_NET_ADMIN, User
from nfq_agent.log import Log, LogEvent
from nfq_agent.queue.queue import Queue
from nfq_agent.service.crew import Crew
from nfq_agent.service.queue_worker import QueueWorker
from nfq_agent.service.system import Workers
from nfq_agent.service.worker import Worker


class RealWorld:
    """What the workers log is printed with a failure, and kept in `lines`. keep: the capabilities of the workers."""

    def __init__(self, user: User, keep: tuple[int, ...] = (CAP_NET_ADMIN,)) -> None:
        self.user = user
        self.keep = keep
        self.lines: list[str] = []
        self.log = Log(self._write, "info", lambda: 0.0)
        self._taken: list[Queue] = []
        self.selector = selectors.EpollSelector()
        self.crew: Workers = Crew(self.selector, self.log, lambda: None)

    def _write(self, event: LogEvent) -> bool:
        os.write(2, event.message.encode() + b"\n")
        self.lines.append(event.message)
        return True

    def worker(self, number: int, fault: Fault = "", max_len: int = 100) -> Worker:
        if fault == "open":
            # Another program has bound this queue.
            self._taken.append(Queue(number).open().bind())
        config = config_for(number, fault, max_len)
        return self.with_rights(QueueWorker("main", number, config, self.user, self.log, lambda: self.crew.descriptors))

    def with_rights(self, worker: Worker) -> Worker:
        worker.capabilities = self.keep
        return worker

    def serves(self, worker: Worker) -> bool:
        child = worker.child
        return child is not None and child.ready and not child.reap()

    def turn(self, seconds: float = 5.0) -> None:
        """Wait for the next event, and process it; then start the workers that are due."""
        for key, _ in self.selector.select(seconds):
            key.data()
        self.crew.revive(time.monotonic())

    def close(self) -> None:
        self.crew.retire(self.crew.workers)
        self.crew.wait_for_leaving()
        for queue in self._taken:
            queue.close()
        self.selector.close()
