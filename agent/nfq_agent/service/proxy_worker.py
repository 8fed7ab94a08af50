"""The worker of a proxy: a child process, and the listeners, which outlive it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Self

from nfq_agent.config.models import Config
from nfq_agent.counters import PROXY_COUNTERS, Slots
from nfq_agent.host.child import DRAIN, Child
from nfq_agent.host.memory import SharedNumbers
from nfq_agent.host.own_process import OwnProcess
from nfq_agent.host.users import User
from nfq_agent.log import Log
from nfq_agent.proxy.listeners import ListenAt, listen, places
from nfq_agent.proxy.serve import serve as serve_proxy
from nfq_agent.proxy.settings import ProxySettings
from nfq_agent.service.confinement import Confinement, access_of
from nfq_agent.service.element_log import ElementLog
from nfq_agent.service.former import Former, add_up
from nfq_agent.service.store import Store
from nfq_agent.service.worker import STOP_WITHIN, Roster, Worker
from nfq_agent.stream import StreamChain
from nfq_agent.values import Endpoint


class ProxyWorker(Worker):
    """The process of one proxy, and its listeners."""

    drains = True
    last_word = DRAIN

    def __init__(self, name: str, config: Config, user: User, log: Log, close: Callable[[], Iterable[int]]) -> None:
        super().__init__(user, log, close)
        self.title = f"proxy {name}"
        self.name = name
        self.config = config.proxy[name]
        self.settings = ProxySettings.of(name, config)
        self.specs = config.stream_elements(self.config)
        self.confinement = Confinement(config.agent.confinement, access_of(self.specs))
        self.ends_within = self.settings.drain + STOP_WITHIN
        self._begin_counting()
        # Earlier processes that may still carry connections, and the sums of those that have ended.
        self._before: list[Former] = []
        self._ended = dict.fromkeys(PROXY_COUNTERS, 0)
        self.listeners: list[socket.socket] = []
        self._instance = config.agent.instance

    def _begin_counting(self) -> None:
        self.memory = SharedNumbers()
        self.counters = Slots(tuple(PROXY_COUNTERS), self.memory.numbers)

    @property
    def key(self) -> tuple[str, object]:
        """The proxy's name."""
        return "proxy", self.name

    def register(self, roster: Roster[Any, ProxyWorker, Any]) -> None:
        """Enter it under the proxy's name."""
        roster.proxies[self.name] = self

    def unregister(self, roster: Roster[Any, Any, Any]) -> None:
        """Remove it."""
        roster.proxies.pop(self.name, None)

    def open(self) -> None:
        """Listen. Connections wait in the kernel until the process accepts them."""
        self.listeners = listen(self.config)

    def close(self) -> None:
        """Stop listening."""
        for listener in self.listeners:
            listener.close()
        self.listeners = []

    def take_over(self, old: Self) -> None:
        """Take over the listeners. Running connections stay with their process, and are counted here too."""
        self._before, self._ended = old._before, old._ended
        # After a failed reload this worker still has its listeners.
        if not self.listeners:
            self.listeners = listen(self.config, dict(zip(places(old.config), old.listeners, strict=True)))

    def inherit(self, store: Store) -> bool:
        """Take over the listeners, and the processes that carry connections now."""
        noted = store.noted(self._name)
        inherited: dict[ListenAt, socket.socket] = {}
        for number, (at, v6only) in enumerate(noted.get("places", ())):
            if (descriptor := store.take(f"listener-{self.name}-{number}")) is not None:
                inherited[Endpoint.parse(at), bool(v6only)] = socket.socket(fileno=descriptor)
        self._before, self._ended = Former.inherited(self.name, store)
        add_up(self._ended, noted.get("ended", {}))
        control, memory = store.take(self._name), store.take(f"tally-{self.name}")
        shared = SharedNumbers(memory)
        counters = Slots(tuple(noted.get("counters", ())), shared.numbers)
        self.predecessor = Child.adopted(self.title, control, noted.get("process"))
        if self.predecessor is not None:
            self._before.append(Former(self.name, self.predecessor, shared, counters))
        else:
            add_up(self._ended, counters.snapshot())
        if not inherited:
            return False
        self.listeners = listen(self.config, inherited)
        for listener in inherited.values():
            if listener not in self.listeners:
                listener.close()
        return True

    @property
    def _name(self) -> str:
        return f"proxy-{self.name}"

    @property
    def stored(self) -> dict[str, tuple[int, bool]]:
        """The listeners, and the processes with their counters."""
        found = {f"listener-{self.name}-{number}": (each.fileno(), False) for number, each in enumerate(self.listeners)}
        found[f"tally-{self.name}"] = self.memory.fileno(), False
        if self.child is not None:
            found[self._name] = self.child.control.fileno(), True
        for former in self._before:
            found |= former.stored
        return found

    @property
    def noted(self) -> dict[str, dict[str, Any]]:
        """Where it listens, who carries connections, and what is counted."""
        return {
            self._name: {
                "process": None if self.child is None else self.child.identity,
                "counters": self.counters.names,
                "places": [(str(at), v6only) for at, v6only in places(self.config)],
                "ended": self._ended,
            },
            **{former.name: former.noted for former in self._before},
        }

    @property
    def formers(self) -> list[Child]:
        """Processes that finish their connections."""
        return [former.child for former in self._before]

    def former_ended(self) -> None:
        """Add up what was counted by those of them that have ended."""
        for former in [former for former in self._before if former.child.exit is not None]:
            self._before.remove(former)
            add_up(self._ended, former.counters.snapshot())

    def abandon(self) -> None:
        """Leave the listeners, and every process, as they are."""

    def release(self, successor: Self) -> None:
        """Stop listening where the successor does not."""
        for listener in self.listeners:
            if listener not in successor.listeners:
                listener.close()
        self.listeners = []

    @property
    def keeps(self) -> set[int]:
        """The listeners."""
        return {listener.fileno() for listener in self.listeners}

    def set_aside(self) -> Child | None:
        """Release the process; its counters still count."""
        child = super().set_aside()
        if child is not None:
            self._before.append(Former(self.name, child, self.memory, self.counters))
            self._begin_counting()
            self.former_ended()
        return child

    @property
    def counted(self) -> dict[str, int]:
        """What all processes of this proxy have counted since the agent started."""
        total = dict(self._ended)
        add_up(total, self.counters.snapshot())
        for former in self._before:
            add_up(total, former.counters.snapshot())
        # A process that was killed had no time to set `active` to 0.
        running = [self.counters, *(former.counters for former in self._before if former.child.exit is None)]
        total["active"] = sum(each.snapshot().get("active", 0) for each in running)
        return {name: total[name] for name in PROXY_COUNTERS}

    def differs(self, other: Self) -> bool:
        """By settings, or by an element's class or options."""
        return (
            self.config != other.config
            or self.settings != other.settings
            or self.specs != other.specs
            or self.confinement != other.confinement
        )

    def body(self, control: socket.socket) -> None:
        """Carry streams until told to stop."""

        def emit(message: str, level: str = "info", **fields: Any) -> None:
            self._log(message, level, **{"proxy": self.name, "instance": self._instance, **fields})

        log = ElementLog(emit, lambda _: None)

        def chain() -> StreamChain:
            return StreamChain([spec.cls(spec.name, spec.options, log.of(spec)) for spec in self.specs])

        settings = replace(self.settings, lingers=self.lingers)
        serve_proxy(
            self.listeners, chain, settings, self.counters, control, emit, OwnProcess(self.pulse.beat, self.confinement.close)
        )
