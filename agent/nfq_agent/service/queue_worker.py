"""The worker of a queue number: a child process, and its queues, which outlive it.

The socket of a queue belongs to the supervisor, so the queue and the packets that wait in it survive a worker that dies.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Self

from nfq_agent.config.drop_lines import drop_lines
from nfq_agent.config.models import Config
from nfq_agent.config.name_needs import name_needs
from nfq_agent.context import Context
from nfq_agent.counters import Counters
from nfq_agent.element_chain import ElementChain
from nfq_agent.host.child import bound_memory
from nfq_agent.host.jail.calls import ProcessNeeds
from nfq_agent.host.nfqueue.statistics import QueueStatistics
from nfq_agent.host.own_process import OwnProcess
from nfq_agent.host.raw import RawSockets
from nfq_agent.host.users import User
from nfq_agent.log import Log
from nfq_agent.queue.settings import QueueSettings
from nfq_agent.queue.turns import WorkerQueue
from nfq_agent.service.confinement import Confinement, access_of
from nfq_agent.service.control import state_folder
from nfq_agent.service.element_log import ElementLog
from nfq_agent.service.flow_watch import FlowWatch
from nfq_agent.service.forwarded import Forwarded, leads_forwarded
from nfq_agent.service.lending import lend, name_part
from nfq_agent.service.order import Order
from nfq_agent.service.packet_judge import WorkerSettings
from nfq_agent.service.packet_loop import WorkerLoop
from nfq_agent.service.programs import capabilities, program_finder
from nfq_agent.service.served_queue import ServedQueue
from nfq_agent.service.served_queues import ServedQueues
from nfq_agent.service.store import Store
from nfq_agent.service.stored_control import StoredControl
from nfq_agent.service.worker import Roster, Worker, judged_now
from nfq_agent.service.worker_counts import LastingCounts
from nfq_agent.verdict import ACCEPT, DROP

if TYPE_CHECKING:
    from nfq_agent.host.owners import HostOwners

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
        self.cuts = config.cuts_datagrams(self.settings)
        self.drop_lines = drop_lines(config, self.settings)
        self.figures = LastingCounts(self.specs)
        self.queues = ServedQueues(number, self.settings, self._wanted, _VERDICTS[self.settings.on_error], log)
        self.raw: RawSockets | None = None
        self.context = Context()
        self._names = name_needs(config) if any(map(name_part, self.specs)) else None
        self.capabilities = capabilities(self.specs)
        # Loaded here: the worker's process may not be able to read the program any more.
        self._finds_owners = _host_owners() if self._tells_owners else None
        # In the worker's process.
        self._owners: HostOwners | None = None
        self.forwarded = _forwarded(config, name, log)
        self._instance = config.agent.instance
        self._lost = Order(None, False)
        self.control = StoredControl(number)

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

    @property
    def counters(self) -> Counters:
        """What its process counts."""
        return self.figures.counters

    @property
    def queue(self) -> WorkerQueue | None:
        """The bound queue of new flows, or of all."""
        return self.queues.first.queue

    @property
    def known(self) -> ServedQueue | None:
        """The queue of known flows, where one is wanted, or was until now and rules may still lead there."""
        return self.queues.known

    def open(self) -> None:
        """Bind the queues and set them up. A flag that this kernel refuses is logged and left off."""
        self.queues.open()
        self._open_raw()
        self._lend()
        self.forwarded.open()

    def _lend(self) -> None:
        def warn(text: str) -> None:
            self._log(f"{self.title}: {text}", "warning", queue=self.number)

        worker = self._instance, f"queue-{self.number}"
        self.context = lend(state_folder(), worker, self.specs, self.settings.midstream, self._names, warn)

    def inherit(self, store: Store) -> bool:
        """Take over the bound queue, the counters, and the process that serves it now."""
        counters = store.take(f"counters-{self.number}")
        noted = store.noted(f"queue-{self.number}")
        self.predecessor = self.control.adopt(store, self.title)
        if counters is not None:
            self.figures = self.figures.inherited(counters, noted)
        if not self.queues.inherit(store, noted):
            return False
        self._open_raw()
        self._lend()
        self.forwarded.open()
        return True

    @property
    def noted(self) -> dict[str, dict[str, Any]]:
        """What the next agent needs to know to take the queue over."""
        known = {
            "process": None if self.child is None else self.child.identity,
            **self.control.noted,
            **self.figures.noted,
            **self.queues.noted,
        }
        return {f"queue-{self.number}": known}

    @property
    def fits(self) -> bool:
        """Whether the queues that were inherited have the settings that are wanted."""
        return self.queues.fits

    @property
    def _wanted(self) -> QueueSettings:
        settings = self.settings
        # The user that a packet tells is compared with that of the socket that is found for it. It costs the kernel a twentieth
        # of what a small packet costs: not for the line of a dropped flow alone.
        process = self._asks_owners or any(spec.cls.reads_process_of(spec.options) for spec in self.specs)
        return QueueSettings(settings.copy_mode, self.copy_range, settings.max_len, settings.fail_open, self.takes_whole, process)

    def refit(self) -> None:
        """Put the wanted settings into force. Nothing may read from the queue. Raises QueueError."""
        self.queues.refit()

    def count_on(self) -> None:
        """Take over what the predecessor counted, now that it has stopped counting."""
        self.figures.count_on()

    @property
    def stored(self) -> dict[str, tuple[int, bool]]:
        """The queue, its counters, and the end of the process's control socket that lets the process live."""
        found = self.queues.stored
        if self.queue is not None:
            found[f"counters-{self.number}"] = self.figures.fileno(), False
        if self.child is not None:
            found[self.control.alone] = self.child.control.fileno(), True
        return found

    def abandon(self) -> None:
        """Leave the queue as it is."""
        super().abandon()
        self.queues.leave()

    def take_lost(self) -> None:
        """The next process takes over what a killed one had read."""
        self.killed = True

    def lost(self, requeue: bool) -> Order:
        """The order to take over from a process that may have left packets without a verdict."""
        return self.queues.lost(requeue)

    def _open_raw(self) -> None:
        """The worker may not open these itself: that takes CAP_NET_RAW."""
        if self.raw is None and any(spec.cls.injects_of(spec.options) for spec in self.specs):
            try:
                self.raw = RawSockets()
            except OSError as error:
                self._log(f"no raw socket: {error}; rejected packets are dropped without an answer", "warning", queue=self.number)

    def close(self) -> None:
        """Unbind the queues. Packets that still wait in them are lost."""
        self.queues.close()
        self.forwarded.close()
        if self.raw is not None:
            self.raw.close()
            self.raw = None

    @property
    def keeps(self) -> set[int]:
        """The queues' sockets, and the raw sockets. In a sibling they would bypass its confinement."""
        return self.queues.descriptors | set(() if self.raw is None else self.raw.filenos())

    @property
    def follows(self) -> dict[int, Callable[[], None]]:
        """The interfaces, where rules lead forwarded traffic to it."""
        return self.forwarded.follows

    def look(self) -> None:
        """Look for containers that are not known yet."""
        self.forwarded.look()

    def take_over(self, old: Self) -> None:
        """Take the bound queue over; no packet that waits in it is lost."""
        self.queues.take_over(old.queues)
        self.figures = self.figures.after(old.figures)
        self.restarts = old.restarts
        # A worker that died and was not replaced yet, or that was killed, may have left packets unanswered.
        self.deaths = old.deaths
        self.killed = old.killed
        self.raw, old.raw = old.raw, None
        self._open_raw()
        self._lend()
        old.forwarded.close()
        self.forwarded.open()
        if self.context.flows is not None and old.context.flows is not None:
            self.context = replace(self.context, flows=old.context.flows)
        self.refit()

    def release(self, successor: Self) -> None:
        """Nothing to release: the successor took over the queues."""

    def differs(self, other: Self) -> bool:
        """By the queue's settings, or by an element's class or options."""
        return (
            self.settings != other.settings
            or self.specs != other.specs
            or self._names != other._names
            or self.confinement != other.confinement
            or self.forwarded.differs(other.forwarded)
        )

    def start(self) -> None:
        """Fork; after a death the new process learns up to which packet number some may be unanswered."""
        if self.deaths or self.killed:
            # A packet that ends each worker that reads it must not be queued again without end.
            self._lost = self.lost(requeue=self.deaths.recent(time.monotonic()) < 2)
        super().start()
        self.queues.leave_to_child()

    @property
    def _asks_owners(self) -> bool:
        return any(spec.cls.reads_owner_of(spec.options) for spec in self.specs)

    @property
    def _tells_owners(self) -> bool:
        """Where elements judge, or all is dropped: for them, the lines of dropped flows, `top`, `trace` and `learn`."""
        return bool(self.specs) or self.settings.default == "drop"

    def _completed(self, context: Context) -> Context:
        """With what only the process itself can open."""
        if self._finds_owners is not None:
            try:
                self._owners = self._finds_owners(program_finder(self.specs, self._user, self._warn, self.counters.skip_program))
            except OSError as error:
                if self._asks_owners:
                    raise
                self._warn(f"flows are shown and logged without their owner: {error}")
        return replace(context, owners=self.forwarded.owners(context.owners if self._owners is None else self._owners))

    def _warn(self, what: str) -> None:
        self._log(f"{self.title}: {what}", "warning", queue=self.number)

    def body(self, control: socket.socket) -> None:
        """Judge packets until told to stop."""
        source = self.queues.to_read(self.cuts, self.counters)
        settings = self.settings
        try:
            bound_memory(settings.memory)
        except OSError as error:
            self._warn(f"its memory could not be limited: {error}; it runs without a limit")

        def emit(message: str, level: str = "info", **fields: Any) -> None:
            self._log(message, level, **{"queue": self.number, "instance": self._instance, **fields})

        log = ElementLog(emit, self.counters.suppress)
        chain = ElementChain(
            [spec.cls(spec.name, spec.options, log.of(spec)) for spec in self.specs],
            _VERDICTS[settings.default],
            monitor=settings.mode == "monitor",
            context=self._completed(replace(self.context, decisions=self.figures.decisions)),
        )
        WorkerLoop(
            source,
            chain,
            WorkerSettings(
                number=self.number,
                default=_VERDICTS[settings.default],
                on_error=_VERDICTS[settings.on_error],
                monitor=settings.mode == "monitor",
                busy_poll=settings.busy_poll,
                lost=self._lost,
                waits=self.waits,
                lingers=self.lingers,
                peers=settings.numbers if settings.cpu_fanout else None,
                drop_lines=self.drop_lines,
            ),
            self.counters,
            control,
            emit,
            None if self.raw is None else self.raw.send,
            OwnProcess(self.pulse.beat, self._shut),
            source,
            FlowWatch(self.ring, chain, {"queue": self.number}),
            self.figures.latency,
            judged_now if chain.follows else None,
        ).run()

    def _shut(self, _: ProcessNeeds | None) -> None:
        if self.confinement.mode == "off":
            return
        needs = self.queues.fix()
        if self.raw is not None:
            route, socket_of_routes = self.raw.fixed
            needs |= ProcessNeeds(sends=((frozenset((socket_of_routes,)), route),))
        if self._owners is not None:
            needs |= self._owners.needs
        self.confinement.close(needs)

    def statistics(self) -> QueueStatistics | None:
        """The kernel's figures for the queue of new flows, or of all; None if it does not show them to this process."""
        return self.queues.first.statistics()

    @property
    def waiting(self) -> bool:
        """Whether a packet waits for its verdict. False where the kernel does not show it."""
        return self.queues.waiting


def _forwarded(config: Config, queue: str, log: Log) -> Forwarded:
    if not leads_forwarded(config, queue):
        return Forwarded(config)
    from nfq_agent.service.forwarded_owners import FollowedInterfaces

    return FollowedInterfaces(config, queue, log)


def _host_owners() -> type[HostOwners]:
    from nfq_agent.host.owners import HostOwners

    return HostOwners
