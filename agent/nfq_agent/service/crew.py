"""Starts, watches, replaces and ends the agent's workers."""

from __future__ import annotations

import contextlib
import math
import selectors
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from nfq_agent.config.models import Config
from nfq_agent.host.child import LEAVE, Child
from nfq_agent.host.users import User
from nfq_agent.log import Log
from nfq_agent.queue.errors import QueueError
from nfq_agent.service.handover import hand_over, keep
from nfq_agent.service.queue_worker import QueueWorker
from nfq_agent.service.store import Store
from nfq_agent.service.worker import Roster, Worker, WorkerError

if TYPE_CHECKING:
    from nfq_agent.service.interface_worker import InterfaceWorker
    from nfq_agent.service.proxy_worker import ProxyWorker

DRAIN_WITHIN: Final = 2.0


class Crew:
    """All workers of the agent. A selector reports when a process ends."""

    def __init__(self, selector: selectors.BaseSelector, log: Log, beat: Callable[[], None], store: Store | None = None) -> None:
        """beat: called now and then during waits. store: from the previous agent, for the next one."""
        self._store = Store() if store is None else store
        self._selector = selector
        self._log = log
        self._beat = beat
        self._roster: Roster[QueueWorker, ProxyWorker, InterfaceWorker] = Roster()
        # Processes that drain, each with the time by which it has to end.
        self._leaving: dict[Child, float] = {}
        self._followed: dict[int, Worker] = {}
        # Workers that are being started and do not serve yet.
        self._coming: list[Worker] = []

    @property
    def queues(self) -> dict[int, QueueWorker]:
        """The queue workers by queue number."""
        return self._roster.queues

    @property
    def proxies(self) -> dict[str, ProxyWorker]:
        """The proxy workers by name."""
        return self._roster.proxies

    @property
    def captures(self) -> dict[tuple[str, str], InterfaceWorker]:
        """The workers of interfaces by kind ("tap", "inline") and name."""
        return self._roster.captures

    @property
    def workers(self) -> list[Worker]:
        """Queue workers first."""
        return [*self.queues.values(), *self.proxies.values(), *self.captures.values()]

    @property
    def descriptors(self) -> Iterator[int]:
        """The descriptors of its siblings that a new child must not keep open."""
        for worker in [*self.workers, *self._coming]:
            for child in (worker.child, worker.predecessor, *worker.formers):
                if child is not None and child.exit is None:
                    yield child.control.fileno()
                    yield child.pidfd
            # A listener that is open in a process that does not accept leaves its clients waiting.
            yield from worker.keeps
            yield from worker.follows
        for child in self._leaving:
            yield child.control.fileno()
            yield child.pidfd

    def add(self, workers: Sequence[Worker], meanwhile: Callable[[], object] = lambda: None) -> None:
        """Open and start these together; return when all serve. Raises what opening raises, or WorkerError; then none is left.

        What the previous agent serves is taken over; if that fails, the previous agent keeps serving. meanwhile: what this
        process does while theirs prepare; what it raises is raised.
        """
        heirs: list[Worker] = []
        inherited: Roster[QueueWorker, ProxyWorker, InterfaceWorker] = Roster()
        try:
            for worker in workers:
                worker.lingers = self._store.outlives
                if worker.inherit(self._store):
                    heirs.append(worker)
                    worker.register(inherited)
                else:
                    worker.open()
            self._coming = list(workers)
            queues = list(inherited.queues.values())
            beside = [worker for worker in workers if worker not in queues]
            hand_over(queues, self._store, self._log, self._beat, beside, meanwhile)
        except BaseException:
            for worker in workers:
                worker.stop()
                if worker in heirs:
                    worker.abandon()
                else:
                    worker.close()
            raise
        finally:
            self._coming = []
        for worker in workers:
            self._keep(worker)
            for former in worker.formers:
                # Its connections end by themselves.
                self._let_leave(former, LEAVE, math.inf)

    def leave(self) -> None:
        """Leave every process running and everything in place: another agent takes over."""
        for worker in self.workers:
            worker.abandon()

    def replace(self, old: Worker, successor: Worker) -> None:
        """Let `successor` serve what `old` has open. Raises WorkerError, QueueError or OSError; then `old` serves again."""
        successor.lingers = old.lingers
        self._dismiss(old)
        try:
            successor.take_over(old)
            successor.start()
            successor.wait_ready(self._beat)
        except BaseException:
            successor.stop()
            try:
                old.take_over(successor)
            except QueueError as error:
                self._log(f"{old.title} continues with settings of the failed reload: {error}", "error", worker=old.title)
            successor.release(old)
            self._resume(old)
            raise
        old.release(successor)
        self._keep(successor)

    def close_leftovers(self) -> None:
        """Close queues of known flows that no rule leads to any more. The process that reads one is restarted without it."""
        for worker in self.queues.values():
            if worker.queues.leftover is None:
                continue
            drain([worker])
            self._dismiss(worker)
            try:
                for name in worker.queues.close_leftover():
                    self._store.drop(name)
            except OSError as error:
                self._log(f"{worker.title}: the service manager was not told what is closed: {error}", "error")
            self._resume(worker)

    def _resume(self, worker: Worker) -> None:
        """Let it serve again. If its process does not become ready, that counts as a death: it is started again later."""
        worker.start()
        with contextlib.suppress(WorkerError):
            worker.wait_ready(self._beat)
        if worker.child is None:
            worker.restart_at = time.monotonic()
        else:
            self._watch(worker)

    def retire(self, workers: Sequence[Worker]) -> None:
        """Wait until their queues are empty, then end and close these. Their rules must be gone. Proxies may drain."""
        drain(workers)
        for worker in workers:
            # A process that has ended has none of them any more.
            kept = [*worker.stored]
            self._dismiss(worker)
            for former in worker.formers:
                if former in self._leaving:
                    former.tell(worker.last_word)
                    self._leaving[former] = min(self._leaving[former], time.monotonic() + worker.ends_within)
            self._forget(worker, kept)
            worker.close()
            worker.unregister(self._roster)

    def _dismiss(self, worker: Worker) -> None:
        """End its process: at once, or, if it drains, when it has finished what it has."""
        self._unwatch(worker)
        if not worker.drains or (child := worker.set_aside()) is None:
            worker.stop()
            return
        self._let_leave(child, worker.last_word, time.monotonic() + worker.ends_within)
        keep(worker, self._store, self._log)

    def _let_leave(self, child: Child, word: bytes, deadline: float) -> None:
        """Tell a process to finish what it has. deadline: when it is killed, in monotonic seconds."""
        child.tell(word)
        self._leaving[child] = deadline

        def ended() -> None:
            self._selector.unregister(child.pidfd)
            self._leaving.pop(child, None)
            child.reap(block=True)
            self._drop_former()

        self._selector.register(child.pidfd, selectors.EVENT_READ, ended)

    def _drop_former(self) -> None:
        """Drop what belonged to a process that has ended."""
        for worker in self.proxies.values():
            before = {**worker.stored, **worker.noted}
            worker.former_ended()
            try:
                for name in before.keys() - worker.stored.keys() - worker.noted.keys():
                    self._store.drop(name)
                    self._store.note(name, None)
            except OSError as error:
                self._log(f"{worker.title}: the service manager was not told that a process ended: {error}", "error")
            keep(worker, self._store, self._log)

    def wait_for_leaving(self) -> None:
        """Return when every process that drains has ended; it is killed when its time is over. Others are not waited for."""
        for child, deadline in list(self._leaving.items()):
            if deadline == math.inf:
                continue
            if not child.wait_end(deadline - time.monotonic(), self._beat):
                self._log(f"{child.title} did not end within its drain time and was killed", "warning", worker=child.title)
                child.kill()
            self._selector.unregister(child.pidfd)
            child.reap(block=True)
            del self._leaving[child]
        self._drop_former()

    def revive(self, now: float) -> float | None:
        """Start dead workers that are due, kill processes whose drain time is over. Returns when the next is due, or None."""
        for child, deadline in self._leaving.items():
            if deadline <= now:
                child.kill()
        for worker in self.workers:
            if worker.restart_at is not None and worker.restart_at <= now:
                worker.start()
                self._watch(worker)
                self._log(f"{worker.title} serves again, pid {worker.pid}", worker=worker.title)
        return min((worker.restart_at for worker in self.workers if worker.restart_at is not None), default=None)

    def _keep(self, worker: Worker) -> None:
        worker.register(self._roster)
        self._watch(worker)

    def _forget(self, worker: Worker, kept: Sequence[str]) -> None:
        """Keep nothing of it for the next agent. kept: the names of what was kept while its process ran."""
        try:
            for name in {*kept, *worker.stored}:
                self._store.drop(name)
            for name in worker.noted:
                self._store.note(name, None)
        except OSError as error:
            self._log(f"{worker.title}: the service manager was not told that it ends: {error}", "error")

    def _watch(self, worker: Worker) -> None:
        assert worker.child is not None
        pidfd = worker.child.pidfd
        keep(worker, self._store, self._log)

        def ended() -> None:
            self._selector.unregister(pidfd)
            pid = worker.pid
            how = worker.died()
            self._log(
                f"{worker.title} (pid {pid}) died: {how}; it is started again, and the rules stay in place",
                "warning",
                worker=worker.title,
            )

        self._selector.register(pidfd, selectors.EVENT_READ, ended)
        for descriptor, read in worker.follows.items():
            if descriptor not in self._followed:
                self._followed[descriptor] = worker
                self._selector.register(descriptor, selectors.EVENT_READ, read)

    def _unwatch(self, worker: Worker) -> None:
        for descriptor in [descriptor for descriptor, whose in self._followed.items() if whose is worker]:
            del self._followed[descriptor]
            self._selector.unregister(descriptor)
        if worker.child is not None:
            with contextlib.suppress(KeyError):
                self._selector.unregister(worker.child.pidfd)


def drain(workers: Sequence[Worker]) -> None:
    """Return when no packet waits in their queues, or after DRAIN_WITHIN seconds: a packet that waits is lost with its queue."""
    deadline = time.monotonic() + DRAIN_WITHIN
    empty = 0
    while workers and time.monotonic() < deadline:
        # Twice, since a packet may be on its way from the rule to the queue.
        empty = 0 if any(worker.waiting for worker in workers) else empty + 1
        if empty == 2:
            return
        time.sleep(0.005)


def workers_of(config: Config, user: User, log: Log, close: Callable[[], Iterable[int]]) -> list[Worker]:
    """The workers that a configuration needs, none of them opened or started. close: as in Worker. Raises ConfigError."""
    found: list[Worker] = [
        QueueWorker(name, number, config, user, log, close) for name, queue in config.queue.items() for number in queue.numbers
    ]
    # Most agents have queues alone, and their start does not wait for the rest.
    if config.proxy:
        from nfq_agent.service.proxy_worker import ProxyWorker

        found += [ProxyWorker(name, config, user, log, close) for name in config.proxy]
    if config.tap:
        from nfq_agent.service.taps import TapWorker

        found += [TapWorker(name, config, user, log, close) for name in config.tap]
    if config.inline:
        from nfq_agent.service.inlines import InlineWorker

        found += [InlineWorker(name, config, user, log, close) for name in config.inline]
    return found
