"""Takes over what the processes of the previous agent serve, as `succession` decides.

Packets that come while one process stops and the next begins wait in the kernel for the next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from nfq_agent.host.child import STOP
from nfq_agent.log import Log
from nfq_agent.service.order import Order
from nfq_agent.service.queue_worker import QueueWorker
from nfq_agent.service.store import Store
from nfq_agent.service.succession import Command, Happening, Succession
from nfq_agent.service.worker import Worker, WorkerError

# Seconds after which a process that does not stop is killed, and that it may take to end then.
_STOPS_WITHIN: Final = 1.0
_ENDS_WITHIN: Final = 5.0


def hand_over(
    queues: Sequence[QueueWorker],
    store: Store,
    log: Log,
    beat: Callable[[], None],
    beside: Sequence[Worker] = (),
    meanwhile: Callable[[], object] = lambda: None,
) -> None:
    """Start a process for each of these and let it serve in place of the predecessor's. Raises WorkerError, QueueError, OSError.

    beside: others that are started together with them. If one cannot be prepared, no predecessor has been told to stop.
    meanwhile: what this process does while theirs prepare.
    """
    # A queue whose settings change has to be without a reader meanwhile; it comes last, when nothing else can fail.
    ready = [worker for worker in queues if worker.fits]
    _Handover(ready, store, log, beat).run(beside, meanwhile)
    for worker in queues:
        if worker not in ready:
            _change(worker, store, log, beat)


def keep(worker: Worker, store: Store, log: Log) -> None:
    """Keep what the next agent needs of a worker."""
    with _told(worker, log):
        _note(worker, store)
        for name, (descriptor, polled) in worker.stored.items():
            store.put(name, descriptor, polled)


def _note(worker: Worker, store: Store) -> None:
    for name, known in worker.noted.items():
        store.note(name, known)


@contextlib.contextmanager
def _told(worker: Worker, log: Log) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        log(f"{worker.title}: the service manager does not keep it: {error}; a restart will lose packets", "error")


class _Handover:
    """Workers that begin together."""

    def __init__(self, workers: Sequence[QueueWorker], store: Store, log: Log, beat: Callable[[], None]) -> None:
        self._workers = {worker.number: worker for worker in workers}
        self._store = store
        self._log = log
        self._beat = beat
        self._succession = Succession({number: worker.predecessor is not None for number, worker in self._workers.items()})

    def run(self, beside: Sequence[Worker], meanwhile: Callable[[], object]) -> None:
        """All of it. Raises WorkerError, OSError."""
        # Packets wait where a predecessor was killed: all prepare at the same time, those of queues begin.
        for worker in self._workers.values():
            worker.waits = True
            worker.start()
        for other in beside:
            other.start()
        meanwhile()
        for other in beside:
            other.wait_ready(self._beat)
        for number, worker in self._workers.items():
            try:
                worker.wait_ready(self._beat)
            except WorkerError:
                self._on(number, Happening.FAILED)
                raise
            self._on(number, Happening.READY)

    def _on(self, number: int, event: Happening) -> None:
        for place, command in self._succession.on(number, event):
            self._do(self._workers[place], command)

    def _do(self, worker: QueueWorker, command: Command) -> None:
        match command:
            case Command.STOP:
                _stop(worker)
                self._on(worker.number, _how_it_stopped(worker))
            case Command.KILL:
                self._log(
                    f"{worker.title} of the previous agent did not stop within {_STOPS_WITHIN:g} s and is killed", "warning"
                )
                _kill(worker)
                self._on(worker.number, Happening.ENDED)
            case Command.KEEP_BESIDE:
                with _told(worker, self._log):
                    worker.control.keep_beside(self._store, worker.child)
            case Command.BEGIN:
                self._begin(worker, Order(None, False))
            case Command.TAKE_LOST:
                self._begin(worker, worker.lost(requeue=True))
            case Command.KEEP:
                with _told(worker, self._log):
                    worker.control.keep_alone(self._store)
                keep(worker, self._store, self._log)
                _forget_predecessor(worker)
            case Command.END_NEW:
                worker.stop()

    def _begin(self, worker: QueueWorker, order: Order) -> None:
        worker.count_on()
        # Before it begins: the next agent must not mistake it for one that waits.
        with _told(worker, self._log):
            _note(worker, self._store)
        worker.begin(order)


def _stop(worker: QueueWorker) -> None:
    if worker.predecessor is not None:
        worker.predecessor.tell(STOP)


def _how_it_stopped(worker: QueueWorker) -> Happening:
    predecessor = worker.predecessor
    if predecessor is None:
        return Happening.ENDED
    if not predecessor.wait_done(_STOPS_WITHIN):
        return Happening.LATE
    return Happening.DONE if predecessor.done else Happening.ENDED


def _kill(worker: QueueWorker) -> None:
    if worker.predecessor is not None:
        worker.predecessor.kill()
        worker.predecessor.wait_end(_ENDS_WITHIN)


def _forget_predecessor(worker: QueueWorker) -> None:
    """Reap it: it has nothing left to do."""
    predecessor, worker.predecessor = worker.predecessor, None
    if predecessor is None:
        return
    if not predecessor.wait_end(_ENDS_WITHIN):
        predecessor.kill()
    predecessor.reap(block=True)


def _change(worker: QueueWorker, store: Store, log: Log, beat: Callable[[], None]) -> None:
    """Take a queue over and put other settings into force. Packets that come meanwhile wait."""
    _stop(worker)
    how = _how_it_stopped(worker)
    if how is Happening.LATE:
        log(f"{worker.title} of the previous agent did not stop within {_STOPS_WITHIN:g} s and is killed", "warning")
        _kill(worker)
    if how is not Happening.DONE:
        worker.take_lost()
    worker.count_on()
    worker.refit()
    worker.start()
    worker.wait_ready(beat)
    keep(worker, store, log)
    _forget_predecessor(worker)
