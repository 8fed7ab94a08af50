"""The agent's child processes: one worker for each queue number, one for each proxy; started, watched, replaced, stopped.

A queue's socket belongs to this process, so the queue and the packets that wait in it outlive a worker that dies.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, Self

from nfq_agent.config.models import Config
from nfq_agent.counters import Counters, Slots
from nfq_agent.element import ElementChain
from nfq_agent.host.child import DRAIN, STOP, Child, NotReady, bound_memory
from nfq_agent.host.nfqueue.statistics import QueueStatistics, statistics
from nfq_agent.host.raw import RawSockets
from nfq_agent.host.users import CAP_NET_ADMIN, User
from nfq_agent.log import Log
from nfq_agent.proxy.listeners import listen
from nfq_agent.proxy.serve import serve as serve_proxy
from nfq_agent.proxy.settings import COUNTERS as PROXY_COUNTERS
from nfq_agent.proxy.settings import ProxySettings
from nfq_agent.queue.queue import Queue, QueueSettingError
from nfq_agent.service.packet_loop import WorkerLoop, WorkerSettings
from nfq_agent.stream import StreamChain
from nfq_agent.verdict import ACCEPT, DROP

READY_WITHIN: Final = 10.0
STOP_WITHIN: Final = 2.0
DRAIN_WITHIN: Final = 2.0
# A worker that died more often than this within this many seconds is not worth another try.
MOST_DEATHS: Final = 5
DEATHS_WITHIN: Final = 30.0
_FIRST_BACK_OFF: Final = 0.1
_VERDICTS: Final = {"accept": ACCEPT, "drop": DROP}


class WorkerError(Exception):
    """A worker that does not start, or that keeps dying."""


class Worker(ABC):
    """One child process that is replaced when it dies, and what it serves, which outlives it."""

    title: str
    ends_within = STOP_WITHIN
    last_word = STOP

    def __init__(self, user: User, log: Log, close: Callable[[], Iterable[int]]) -> None:
        """close: descriptors of the parent that a child must not keep alive."""
        self.child: Child | None = None
        self.deaths: deque[float] = deque(maxlen=MOST_DEATHS)
        self.restarts = 0
        # It did not stop in time: like a death, but none that speaks against it.
        self.killed = False
        self.restart_at: float | None = None
        self._user = user
        self._log = log
        self._close = close

    @property
    @abstractmethod
    def key(self) -> tuple[str, object]:
        """What it is the worker of: two of one key serve the same."""

    @abstractmethod
    def open(self) -> None:
        """Take what it serves from the kernel. Raises QueueError or OSError."""

    @abstractmethod
    def close(self) -> None:
        """Give that back."""

    @abstractmethod
    def inherit(self, there: Self) -> None:
        """Take it over from another worker of the same queue or proxy, with this one's settings."""

    @abstractmethod
    def let_go(self, to: Self) -> None:
        """Give back what `to`, which serves instead, did not take over."""

    @abstractmethod
    def differs(self, other: Self) -> bool:
        """Whether `other` serves otherwise, so that it has to take this one's place."""

    @abstractmethod
    def body(self, control: socket.socket) -> None:
        """What the child does."""

    @property
    def keeps(self) -> set[int]:
        """Descriptors that its process needs, although others may have them too."""
        return set()

    @property
    def pid(self) -> int | None:
        """The process that serves now, or None."""
        return None if self.child is None else self.child.pid

    def start(self) -> None:
        """Fork the process; `wait_ready` tells when it serves."""
        self.restart_at = None
        others = set(self._close()) - self.keeps
        self.child = Child(self.title, self.body, self._user, (CAP_NET_ADMIN,), others)

    def wait_ready(self, beat: Callable[[], None], within: float = READY_WITHIN) -> None:
        """Return once it serves. beat: called now and then meanwhile. Raises WorkerError if it ends, or takes too long."""
        assert self.child is not None
        try:
            self.child.wait_ready(within, beat)
        except NotReady as error:
            if self.child.exit is not None:
                self.child = None
            raise WorkerError(str(error)) from error

    def died(self) -> str:
        """Reap it and say when the next one is due. Raises WorkerError when it has died too often."""
        child = self.child
        assert child is not None
        child.reap(block=True)
        self.child = None
        now = time.monotonic()
        self.deaths.append(now)
        recent = [death for death in self.deaths if now - death < DEATHS_WITHIN]
        if len(recent) >= MOST_DEATHS:
            raise WorkerError(f"{self.title} died {len(recent)} times within {DEATHS_WITHIN:g} s, last by {child.how_it_ended}")
        # The first death is answered at once: traffic waits.
        back_off = 0.0 if len(recent) == 1 else _FIRST_BACK_OFF * 2 ** (len(recent) - 2)
        self.restart_at = now + back_off
        self.restarts += 1
        return child.how_it_ended

    def stop(self, word: bytes = STOP, within: float = STOP_WITHIN) -> None:
        """Have it answer what it holds and end; kill it if it does not within `within` seconds."""
        self.restart_at = None
        child = self.child
        if child is None:
            return
        child.tell(word)
        if not child.wait_end(within):
            self._log(f"{self.title} did not stop within {within:g} s and was killed", "warning", worker=child.pid)
            child.kill()
            self.killed = True
        child.reap(block=True)
        self.child = None


class QueueWorker(Worker):
    """The worker of one queue number, and the queue."""

    def __init__(self, name: str, number: int, config: Config, user: User, log: Log, close: Callable[[], Iterable[int]]) -> None:
        super().__init__(user, log, close)
        self.title = f"worker of queue {number}"
        self.name = name
        self.number = number
        self.settings = config.queue[name]
        self.specs = config.packet_elements(self.settings)
        self.copy_range = config.copy_range(self.settings)
        self.counters = Counters()
        self.queue: Queue | None = None
        self.raw: RawSockets | None = None
        self._instance = config.agent.instance
        self._lost_below: int | None = None
        self._progress = (0, time.monotonic())

    @property
    def key(self) -> tuple[str, object]:
        """The queue number."""
        return "queue", self.number

    def open(self) -> None:
        """Bind the queue and set it up; what this kernel refuses of its flags is said and done without."""
        settings = self.settings
        queue = Queue(
            self.number,
            copy=settings.copy_mode,
            copy_range=self.copy_range,
            max_len=settings.max_len,
            on_unanswered=_VERDICTS[settings.on_error],
        )
        queue.open()
        try:
            queue.bind()
        except BaseException:
            queue.close()
            raise
        self.queue = queue
        self._set_flags(queue)
        self._open_raw()

    def _open_raw(self) -> None:
        """The worker may not open these itself: that takes CAP_NET_RAW."""
        if self.raw is None and any(spec.cls.injects_of(spec.options) for spec in self.specs):
            try:
                self.raw = RawSockets()
            except OSError as error:
                self._log(f"no raw socket: {error}; what is rejected is dropped without an answer", "warning", queue=self.number)

    def _set_flags(self, queue: Queue) -> None:
        process = any(spec.cls.reads_process_of(spec.options) for spec in self.specs)
        for flag, wanted in (("fail_open", self.settings.fail_open), ("gso", self.settings.gso), ("uid_gid", process)):
            if wanted == getattr(queue.settings, flag):
                continue
            try:
                queue.configure(**{flag: wanted})  # type: ignore[arg-type]  # these three are all switches
            except QueueSettingError as error:
                self._log(f"{error}; it goes on without", "warning", queue=self.number)

    def close(self) -> None:
        """Unbind the queue. A packet that still waits dies."""
        if self.queue is not None:
            self.queue.close()
            self.queue = None
        if self.raw is not None:
            self.raw.close()
            self.raw = None

    def inherit(self, there: Self) -> None:
        """Take the bound queue over; nothing that waits in it is lost."""
        queue, there.queue = there.queue, None
        assert queue is not None
        self.queue = queue
        self.counters = there.counters
        self.restarts = there.restarts
        # One that died and was not replaced yet, or was killed to make room, may have left packets unanswered.
        self.deaths = there.deaths
        self.killed = there.killed
        self.raw, there.raw = there.raw, None
        self._open_raw()
        queue.configure(copy=self.settings.copy_mode, copy_range=self.copy_range, max_len=self.settings.max_len)
        self._set_flags(queue)

    def let_go(self, to: Self) -> None:
        """Nothing: `to` has the queue, whole."""

    def differs(self, other: Self) -> bool:
        """By the queue's settings, or by an element's class or options."""
        return self.settings != other.settings or self.specs != other.specs

    def start(self) -> None:
        """Fork; a successor is told up to where its predecessor may have left packets unanswered."""
        if (self.deaths or self.killed) and (line := self.statistics()) is not None:
            self._lost_below = line.id_sequence
        self._progress = (0, time.monotonic())
        super().start()
        if self.queue is not None:
            self.queue.leave_to_child()

    def body(self, control: socket.socket) -> None:
        """Judge packets until told to stop."""
        assert self.queue is not None
        settings = self.settings
        try:
            bound_memory(settings.memory)
        except OSError as error:
            self._log(f"{self.title}: its memory could not be limited: {error}; it goes on without", "warning", queue=self.number)

        def emit(message: str, level: str = "info", **fields: Any) -> None:
            self._log(message, level, **{"queue": self.number, "instance": self._instance, **fields})

        chain = ElementChain(
            [spec.cls(spec.name, spec.options, emit) for spec in self.specs],
            _VERDICTS[settings.default],
            monitor=settings.mode == "monitor",
        )
        WorkerLoop(
            self.queue,
            chain,
            WorkerSettings(
                number=self.number,
                default=_VERDICTS[settings.default],
                on_error=_VERDICTS[settings.on_error],
                monitor=settings.mode == "monitor",
                busy_poll=settings.busy_poll,
                lost_below=self._lost_below,
                peers=settings.numbers if settings.cpu_fanout else None,
            ),
            self.counters,
            control,
            emit,
            None if self.raw is None else self.raw.send,
        ).run()

    def statistics(self) -> QueueStatistics | None:
        """The kernel's figures for this queue; None where it does not let us look."""
        try:
            return statistics().get(self.number)
        except OSError:
            return None

    @property
    def waiting(self) -> bool:
        """Whether a packet waits for its verdict. False where the kernel does not let us look."""
        line = self.statistics()
        return line is not None and line.waiting > 0

    def stuck_for(self, now: float) -> float:
        """Seconds without progress while packets may be waiting: since the last turn of the loop, or the start of the process."""
        turns, since = self._progress
        current = self.counters.turns
        if current != turns or self.child is None or not (self.child.ready or self.deaths):
            self._progress = (current, now)
            return 0.0
        return now - since


class ProxyWorker(Worker):
    """The process of one proxy, and its listeners."""

    last_word = DRAIN

    def __init__(self, name: str, config: Config, user: User, log: Log, close: Callable[[], Iterable[int]]) -> None:
        super().__init__(user, log, close)
        self.title = f"proxy {name}"
        self.name = name
        self.config = config.proxy[name]
        self.settings = ProxySettings.of(name, config)
        self.specs = config.stream_elements(self.config)
        self.ends_within = self.settings.drain + STOP_WITHIN
        self.counters = Slots(PROXY_COUNTERS)
        # What processes before this one count that may still carry connections, and what those had counted that have ended.
        self._before: list[tuple[Child, Slots]] = []
        self._ended = dict.fromkeys(PROXY_COUNTERS, 0)
        self.listeners: list[socket.socket] = []
        self._instance = config.agent.instance

    @property
    def key(self) -> tuple[str, object]:
        """The proxy's name."""
        return "proxy", self.name

    def open(self) -> None:
        """Listen. Connections wait in the kernel until the process takes them."""
        self.listeners = listen(self.config)

    def close(self) -> None:
        """Stop listening."""
        for listener in self.listeners:
            listener.close()
        self.listeners = []

    def inherit(self, there: Self) -> None:
        """Take the listeners over; connections that run end with the process that has them, and are counted with ours."""
        self._before, self._ended = there._before, there._ended
        # One whose successor did not serve still has them.
        if not self.listeners:
            self.listeners = listen(self.config, there.config, there.listeners)

    def let_go(self, to: Self) -> None:
        """Stop listening where `to` does not."""
        for listener in self.listeners:
            if listener not in to.listeners:
                listener.close()
        self.listeners = []

    @property
    def keeps(self) -> set[int]:
        """The listeners."""
        return {listener.fileno() for listener in self.listeners}

    def set_aside(self, child: Child) -> None:
        """Another process will count from now on, beside this one."""
        self._before.append((child, self.counters))
        self.counters = Slots(PROXY_COUNTERS)
        for each in [each for each in self._before if each[0].exit is not None]:
            self._before.remove(each)
            for name, value in each[1].snapshot().items():
                self._ended[name] += value if name != "active" else 0

    @property
    def counted(self) -> dict[str, int]:
        """What all processes of this proxy have counted since the agent started."""
        total = {name: value + self._ended[name] for name, value in self.counters.snapshot().items()}
        for child, slots in self._before:
            for name, value in slots.snapshot().items():
                # One that was killed had no time to say that it carries nothing any more.
                total[name] += value if name != "active" or child.exit is None else 0
        return total

    def differs(self, other: Self) -> bool:
        """By settings, or by an element's class or options."""
        return self.config != other.config or self.settings != other.settings or self.specs != other.specs

    def body(self, control: socket.socket) -> None:
        """Carry streams until told to stop."""

        def emit(message: str, level: str = "info", **fields: Any) -> None:
            self._log(message, level, **{"proxy": self.name, "instance": self._instance, **fields})

        def chain() -> StreamChain:
            return StreamChain([spec.cls(spec.name, spec.options, emit) for spec in self.specs])

        serve_proxy(self.listeners, chain, self.settings, self.counters, control, emit)


class Crew:
    """All workers of the agent, and the selector that tells of their ends."""

    def __init__(self, selector: selectors.BaseSelector, log: Log, beat: Callable[[], None]) -> None:
        """beat: called now and then while this waits for a worker."""
        self._selector = selector
        self._log = log
        self._beat = beat
        # Proxies that take nothing new and carry what they have to its end, with the time when that has to be.
        self._leaving: dict[Child, float] = {}
        # Those that are started together, and not yet among the others.
        self._coming: list[Worker] = []
        self.queues: dict[int, QueueWorker] = {}
        self.proxies: dict[str, ProxyWorker] = {}

    @property
    def workers(self) -> list[Worker]:
        """Queue workers first."""
        return [*self.queues.values(), *self.proxies.values()]

    @property
    def descriptors(self) -> Iterator[int]:
        """What a new child must not keep alive of its siblings."""
        for worker in [*self.workers, *self._coming]:
            if worker.child is not None and worker.child.exit is None:
                yield worker.child.control.fileno()
                yield worker.child.pidfd
            # A port is free again when nobody has its listener, and who has it and does not know leaves its clients waiting.
            yield from worker.keeps
        for child in self._leaving:
            yield child.control.fileno()
            yield child.pidfd

    def add(self, workers: Sequence[Worker]) -> None:
        """Open and start these together; return when all serve. Raises what opening raises, or WorkerError; none is left then."""
        try:
            for worker in workers:
                worker.open()
            self._coming = list(workers)
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.wait_ready(self._beat)
        except BaseException:
            for worker in workers:
                worker.stop()
                worker.close()
            raise
        finally:
            self._coming = []
        for worker in workers:
            self._keep(worker)

    def replace(self, there: Worker, successor: Worker) -> None:
        """Let `successor` serve on what `there` has open. Raises WorkerError or QueueError; `there` serves again then."""
        self._dismiss(there)
        try:
            successor.inherit(there)
            successor.start()
            successor.wait_ready(self._beat)
        except BaseException:
            successor.stop()
            there.inherit(successor)
            successor.let_go(there)
            there.start()
            with contextlib.suppress(WorkerError):
                there.wait_ready(self._beat)
            self._watch(there)
            raise
        there.let_go(successor)
        self._keep(successor)

    def retire(self, workers: Sequence[Worker]) -> None:
        """Let queues run empty, then end and close these. Their rules must be gone. Proxies may go on for their drain time."""
        drain([worker for worker in workers if isinstance(worker, QueueWorker)])
        for worker in workers:
            self._dismiss(worker)
            worker.close()
            if isinstance(worker, QueueWorker):
                self.queues.pop(worker.number, None)
            elif isinstance(worker, ProxyWorker):
                self.proxies.pop(worker.name, None)

    def _dismiss(self, worker: Worker) -> None:
        """End its process: a queue's at once, a proxy's when its connections have ended."""
        self._unwatch(worker)
        if isinstance(worker, QueueWorker) or worker.child is None:
            worker.stop()
            return
        child, worker.child, worker.restart_at = worker.child, None, None
        if isinstance(worker, ProxyWorker):
            worker.set_aside(child)
        child.tell(worker.last_word)
        self._leaving[child] = time.monotonic() + worker.ends_within

        def ended() -> None:
            self._selector.unregister(child.pidfd)
            self._leaving.pop(child, None)
            child.reap(block=True)

        self._selector.register(child.pidfd, selectors.EVENT_READ, ended)

    def wait_for_leaving(self) -> None:
        """Return when no proxy carries a connection any more, or their time is over."""
        for child, deadline in list(self._leaving.items()):
            if not child.wait_end(deadline - time.monotonic(), self._beat):
                self._log(f"{child.title} did not end within its drain time and was killed", "warning", worker=child.pid)
                child.kill()
            self._selector.unregister(child.pidfd)
            child.reap(block=True)
        self._leaving.clear()

    def revive(self, now: float) -> float | None:
        """Start again those that are due, end those whose time to leave is over; the time when the next is due, or None."""
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
        if isinstance(worker, QueueWorker):
            self.queues[worker.number] = worker
        elif isinstance(worker, ProxyWorker):
            self.proxies[worker.name] = worker
        self._watch(worker)

    def _watch(self, worker: Worker) -> None:
        assert worker.child is not None
        pidfd = worker.child.pidfd

        def ended() -> None:
            self._selector.unregister(pidfd)
            pid = worker.pid
            how = worker.died()
            self._log(
                f"{worker.title} (pid {pid}) died: {how}; another takes over, and the rules stay",
                "warning",
                worker=worker.title,
            )

        self._selector.register(pidfd, selectors.EVENT_READ, ended)

    def _unwatch(self, worker: Worker) -> None:
        if worker.child is not None:
            with contextlib.suppress(KeyError):
                self._selector.unregister(worker.child.pidfd)


def drain(workers: Sequence[QueueWorker]) -> None:
    """Return when no packet waits in these queues, or after a while: one that waits dies with its queue."""
    deadline = time.monotonic() + DRAIN_WITHIN
    empty = 0
    while workers and time.monotonic() < deadline:
        # Twice, since a packet may be on its way from the rule to the queue.
        empty = 0 if any(worker.waiting for worker in workers) else empty + 1
        if empty == 2:
            return
        time.sleep(0.005)
