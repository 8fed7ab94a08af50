"""The worker of a proxy: a child process, and the listeners, which outlive it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from typing import Any, Self

from nfq_agent.config.models import Config
from nfq_agent.counters import PROXY_COUNTERS, Slots
from nfq_agent.host.child import DRAIN, Child
from nfq_agent.host.users import User
from nfq_agent.log import Log
from nfq_agent.proxy.listeners import listen
from nfq_agent.proxy.serve import serve as serve_proxy
from nfq_agent.proxy.settings import ProxySettings
from nfq_agent.service.worker import STOP_WITHIN, Roster, Worker
from nfq_agent.stream import StreamChain


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
        self.ends_within = self.settings.drain + STOP_WITHIN
        self.counters = Slots(tuple(PROXY_COUNTERS))
        # The counters of earlier processes that may still carry connections, and the sums of those that have ended.
        self._before: list[tuple[Child, Slots]] = []
        self._ended = dict.fromkeys(PROXY_COUNTERS, 0)
        self.listeners: list[socket.socket] = []
        self._instance = config.agent.instance

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
        """Take the listeners over. Running connections stay with the process that has them, and are counted with ours."""
        self._before, self._ended = old._before, old._ended
        # After a failed reload this worker still has its listeners.
        if not self.listeners:
            self.listeners = listen(self.config, old.config, old.listeners)

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
        """Give up the process, whose counters still count."""
        child = super().set_aside()
        if child is not None:
            self._before.append((child, self.counters))
            self.counters = Slots(tuple(PROXY_COUNTERS))
            for each in [each for each in self._before if each[0].exit is not None]:
                self._before.remove(each)
                for name, value in each[1].snapshot().items():
                    self._ended[name] += value if name != "active" else 0
        return child

    @property
    def counted(self) -> dict[str, int]:
        """What all processes of this proxy have counted since the agent started."""
        total = {name: value + self._ended[name] for name, value in self.counters.snapshot().items()}
        for child, slots in self._before:
            for name, value in slots.snapshot().items():
                # A process that was killed had no time to set `active` to 0.
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

        serve_proxy(self.listeners, chain, self.settings, self.counters, control, emit, self.pulse.beat)
