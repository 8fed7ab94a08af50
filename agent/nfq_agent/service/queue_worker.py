"""The worker of a queue number: a child process, and the queue, which outlives it.

The socket of a queue belongs to the supervisor, so the queue and the packets that wait in it survive a worker that dies.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any, Final, Self

from nfq_agent.config.models import Config
from nfq_agent.config.name_needs import name_needs
from nfq_agent.context import Context
from nfq_agent.counters import Counters, Slots
from nfq_agent.element import ElementChain
from nfq_agent.host.child import Child, bound_memory
from nfq_agent.host.jail.calls import ProcessNeeds
from nfq_agent.host.memory import SharedNumbers
from nfq_agent.host.nfqueue.statistics import QueueStatistics, statistics
from nfq_agent.host.own_process import OwnProcess
from nfq_agent.host.owners import HostOwners
from nfq_agent.host.raw import RawSockets
from nfq_agent.host.users import User
from nfq_agent.log import Log
from nfq_agent.queue.errors import QueueSettingError
from nfq_agent.queue.settings import FLAGS, QueueSettings
from nfq_agent.queue.turns import WorkerQueue
from nfq_agent.service.confinement import Confinement, access_of
from nfq_agent.service.control import folder
from nfq_agent.service.element_log import ElementLog
from nfq_agent.service.lending import lend, name_part
from nfq_agent.service.order import Order
from nfq_agent.service.packet_judge import WorkerSettings
from nfq_agent.service.packet_loop import WorkerLoop
from nfq_agent.service.store import Store
from nfq_agent.service.worker import Roster, Worker
from nfq_agent.verdict import ACCEPT, DROP

# Set to anything: every packet is shown to the elements, also those that they need not be shown.
_EVERY_PACKET: Final = "NFQ_AGENT_EVERY_PACKET"
_VERDICTS: Final = {"accept": ACCEPT, "drop": DROP}


class QueueWorker(Worker):
    """The worker of one queue number, and the queue."""

    def __init__(self, name: str, number: int, config: Config, user: User, log: Log, close: Callable[[], Iterable[int]]) -> None:
        super().__init__(user, log, close)
        self.title = f"worker of queue {number}"
        self.name = name
        self.number = number
        self.settings = config.queue[name]
        self.specs = config.packet_elements(self.settings)
        self.confinement = Confinement(config.agent.confinement, access_of(self.specs))
        self.copy_range = config.copy_range(self.settings)
        self.takes_whole = config.takes_whole(self.settings)
        self.memory = SharedNumbers()
        self.counters = Counters(self.memory.numbers)
        self.queue: WorkerQueue | None = None
        self.raw: RawSockets | None = None
        self.context = Context()
        self._names = name_needs(config) if any(map(name_part, self.specs)) else None
        # In the worker's process.
        self._owners: HostOwners | None = None
        self._instance = config.agent.instance
        self._lost = Order(None, False)
        # What a process before this one counted in memory of another layout.
        self._former: Slots | None = None

    @property
    def key(self) -> tuple[str, object]:
        """The queue number."""
        return "queue", self.number

    def register(self, roster: Roster[QueueWorker, Any, Any]) -> None:
        """Enter it under its queue number."""
        roster.queues[self.number] = self

    def unregister(self, roster: Roster[Any, Any, Any]) -> None:
        """Remove it."""
        roster.queues.pop(self.number, None)

    def open(self) -> None:
        """Bind the queue and set it up. A flag that this kernel refuses is logged and left off."""
        queue = self._unbound().open()
        try:
            queue.bind()
        except BaseException:
            queue.close()
            raise
        self.queue = queue
        self._set_flags(queue)
        self._open_raw()
        self._lend()

    def _lend(self) -> None:
        def warn(text: str) -> None:
            self._log(f"{self.title}: {text}", "warning", queue=self.number)

        worker = self._instance, f"queue-{self.number}"
        self.context = lend(folder(), worker, self.specs, self.settings.midstream, self._names, warn)

    def _unbound(self) -> WorkerQueue:
        return WorkerQueue(
            self.number,
            copy=self.settings.copy_mode,
            copy_range=self.copy_range,
            max_len=self.settings.max_len,
            on_unanswered=_VERDICTS[self.settings.on_error],
        )

    def inherit(self, store: Store) -> bool:
        """Take over the bound queue, the counters, and the process that serves it now."""
        queue, counters, control = (store.take(f"{kind}-{self.number}") for kind in ("queue", "counters", "worker"))
        noted = store.noted(f"queue-{self.number}")
        self.predecessor = Child.adopted(self.title, control, noted.get("process"))
        if counters is not None:
            memory, names = SharedNumbers(counters), tuple(noted.get("counters", ()))
            if names == self.counters.names:
                self.memory, self.counters = memory, Counters(memory.numbers)
            else:
                self._former = Slots(names, memory.numbers)
        if queue is None:
            return False
        self.queue = self._unbound().adopt(queue, _settings(noted))
        self._open_raw()
        self._lend()
        return True

    @property
    def noted(self) -> dict[str, dict[str, Any]]:
        """What an agent after this one needs to know to take the queue over."""
        known = {
            "process": None if self.child is None else self.child.identity,
            "counters": self.counters.names,
            "settings": None if self.queue is None else asdict(self.queue.settings),
        }
        return {f"queue-{self.number}": known}

    @property
    def fits(self) -> bool:
        """Whether the queue that was inherited has the settings that are wanted."""
        assert self.queue is not None
        return self.queue.settings == self._wanted

    @property
    def _wanted(self) -> QueueSettings:
        settings = self.settings
        process = any(spec.cls.reads_process_of(spec.options) for spec in self.specs)
        return QueueSettings(settings.copy_mode, self.copy_range, settings.max_len, settings.fail_open, self.takes_whole, process)

    def refit(self) -> None:
        """Put the wanted settings into force. Nothing may read from the queue. Raises QueueError."""
        assert self.queue is not None
        self.queue.configure(copy=self.settings.copy_mode, copy_range=self.copy_range, max_len=self.settings.max_len)
        self._set_flags(self.queue)

    def count_on(self) -> None:
        """Take over what the predecessor counted, now that it has stopped counting."""
        if self._former is not None:
            self.counters.become(self._former.snapshot())
            self._former = None

    @property
    def stored(self) -> dict[str, tuple[int, bool]]:
        """The queue, its counters, and the end of the process's control socket that lets the process live."""
        found: dict[str, tuple[int, bool]] = {}
        if self.queue is not None:
            found[f"queue-{self.number}"] = self.queue.fileno(), False
            found[f"counters-{self.number}"] = self.memory.fileno(), False
        if self.child is not None:
            found[f"worker-{self.number}"] = self.child.control.fileno(), True
        return found

    def abandon(self) -> None:
        """Leave the queue as it is."""
        super().abandon()
        if self.queue is not None:
            self.queue.leave()

    def take_lost(self) -> None:
        """The next process takes over what a killed one had read."""
        self.killed = True

    def lost(self, requeue: bool) -> Order:
        """The order to take over from a process that may have left packets without a verdict."""
        line = self.statistics()
        return Order(None if line is None else line.id_sequence, requeue)

    def _open_raw(self) -> None:
        """The worker may not open these itself: that takes CAP_NET_RAW."""
        if self.raw is None and any(spec.cls.injects_of(spec.options) for spec in self.specs):
            try:
                self.raw = RawSockets()
            except OSError as error:
                self._log(f"no raw socket: {error}; rejected packets are dropped without an answer", "warning", queue=self.number)

    def _set_flags(self, queue: WorkerQueue) -> None:
        for flag in FLAGS:
            wanted = getattr(self._wanted, flag)
            if wanted == getattr(queue.settings, flag):
                continue
            try:
                queue.configure(**{flag: wanted})
            except QueueSettingError as error:
                self._log(f"{error}; the queue works without it", "warning", queue=self.number)

    def close(self) -> None:
        """Unbind the queue. Packets that still wait in it are lost."""
        if self.queue is not None:
            self.queue.close()
            self.queue = None
        if self.raw is not None:
            self.raw.close()
            self.raw = None

    @property
    def keeps(self) -> set[int]:
        """The queue's socket, and the raw sockets. In a sibling they would be a way round its confinement."""
        queue = set() if self.queue is None else self.queue.descriptors
        return queue | set(() if self.raw is None else self.raw.filenos())

    def take_over(self, old: Self) -> None:
        """Take the bound queue over; no packet that waits in it is lost."""
        queue, old.queue = old.queue, None
        assert queue is not None
        self.queue = queue
        self.memory, self.counters = old.memory, old.counters
        self.restarts = old.restarts
        # A worker that died and was not replaced yet, or that was killed, may have left packets unanswered.
        self.deaths = old.deaths
        self.killed = old.killed
        self.raw, old.raw = old.raw, None
        self._open_raw()
        self._lend()
        if self.context.flows is not None and old.context.flows is not None:
            self.context = replace(self.context, flows=old.context.flows)
        self.refit()

    def release(self, successor: Self) -> None:
        """Nothing to release: the successor took over the queue."""

    def differs(self, other: Self) -> bool:
        """By the queue's settings, or by an element's class or options."""
        return (
            self.settings != other.settings
            or self.specs != other.specs
            or self._names != other._names
            or self.confinement != other.confinement
        )

    def start(self) -> None:
        """Fork; after a death the new process learns up to which packet number some may be unanswered."""
        if self.deaths or self.killed:
            # A packet that ends each worker that reads it is not to go round for ever.
            self._lost = self.lost(requeue=self.deaths.recent(time.monotonic()) < 2)
        super().start()
        if self.queue is not None:
            self.queue.leave_to_child()

    def _completed(self, context: Context) -> Context:
        """With what only the process itself can open."""
        if any(spec.cls.reads_owner_of(spec.options) for spec in self.specs):
            self._owners = HostOwners()
            return replace(context, owners=self._owners)
        return context

    def body(self, control: socket.socket) -> None:
        """Judge packets until told to stop."""
        assert self.queue is not None
        settings = self.settings
        try:
            bound_memory(settings.memory)
        except OSError as error:
            self._log(
                f"{self.title}: its memory could not be limited: {error}; it runs without a limit", "warning", queue=self.number
            )

        def emit(message: str, level: str = "info", **fields: Any) -> None:
            self._log(message, level, **{"queue": self.number, "instance": self._instance, **fields})

        log = ElementLog(emit, self.counters.suppress)
        chain = ElementChain(
            [spec.cls(spec.name, spec.options, log.of(spec)) for spec in self.specs],
            _VERDICTS[settings.default],
            monitor=settings.mode == "monitor",
            context=self._completed(self.context),
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
                lost_below=self._lost.below,
                requeue=self._lost.requeue,
                waits=self.waits,
                lingers=self.lingers,
                peers=settings.numbers if settings.cpu_fanout else None,
            ),
            self.counters,
            control,
            emit,
            None if self.raw is None else self.raw.send,
            OwnProcess(self.pulse.beat, self._shut),
            None if os.environ.get(_EVERY_PACKET) else self.queue,
        ).run()

    def _shut(self, _: ProcessNeeds | None) -> None:
        assert self.queue is not None
        if self.confinement.mode == "off":
            return
        headers, fixed = self.queue.fix()
        needs = ProcessNeeds(headers=(headers,), fixed=fixed)
        if self.raw is not None:
            route, socket_of_routes = self.raw.fixed
            needs |= ProcessNeeds(headers=(route,), fixed=frozenset((socket_of_routes,)))
        if self._owners is not None:
            needs |= self._owners.needs
        self.confinement.close(needs)

    def statistics(self) -> QueueStatistics | None:
        """The kernel's figures for this queue; None if it does not show them to this process."""
        try:
            return statistics().get(self.number)
        except OSError:
            return None

    @property
    def waiting(self) -> bool:
        """Whether a packet waits for its verdict. False where the kernel does not show it."""
        line = self.statistics()
        return line is not None and line.waiting > 0


def _settings(noted: Mapping[str, Any]) -> QueueSettings:
    """The settings of a queue as another process noted them; what it did not note is unlike any that is wanted."""
    unknown: dict[str, Any] = {
        "copy": "packet", "copy_range": 0, "max_len": 0, "fail_open": False, "gso": False, "uid_gid": False,
    }  # fmt: skip
    found = noted.get("settings")
    return QueueSettings(**(unknown | (found if isinstance(found, dict) and found.keys() == unknown.keys() else {})))
