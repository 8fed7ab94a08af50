"""The worker of one `[tap.NAME]`, and the interfaces that the supervisor finds for it.

The supervisor opens a socket for each interface, hands it over and closes its own copy: what a tap has ends with its worker.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from typing import Any, Final, Self

from nfq_agent.capture import handing
from nfq_agent.capture.following import Followed, Follower, Table
from nfq_agent.capture.selection import classic_filter
from nfq_agent.capture.serving import selection_of
from nfq_agent.capture.tap import Tap
from nfq_agent.config.models import Config
from nfq_agent.counters import TAP_COUNTERS, Counters
from nfq_agent.element import ElementChain
from nfq_agent.host import packet_socket
from nfq_agent.host.child import bound_memory
from nfq_agent.host.links import Link, Links, links
from nfq_agent.host.users import User
from nfq_agent.log import Log
from nfq_agent.service.packet_judge import WorkerSettings
from nfq_agent.service.packet_loop import WorkerLoop
from nfq_agent.service.worker import Roster, Worker, WorkerError
from nfq_agent.verdict import ACCEPT

# Before a packet there are the Ethernet header and up to two tags.
_LINK_HEADER: Final = 22


class TapWorker(Worker):
    """The process of one tap."""

    # It reads what it is given and answers nothing.
    capabilities: tuple[int, ...] = ()

    def __init__(self, name: str, config: Config, user: User, log: Log, close: Callable[[], Iterable[int]]) -> None:
        super().__init__(user, log, close)
        self.title = f"tap {name}"
        self.name = name
        self.settings = config.tap[name]
        self.specs = config.packet_elements(self.settings)
        self.counters = Counters()
        self.table = Table(tuple(TAP_COUNTERS))
        self._selection = selection_of(self.settings)
        copied = config.least_copied(self.settings) if self.settings.snap == "auto" else self.settings.snap
        self.snap = copied
        self._filter = classic_filter(self._selection, copied + _LINK_HEADER)
        self._follower = Follower(self._selection)
        self._links: Links | None = None
        self._instance = config.agent.instance
        # What interfaces counted that are gone.
        self._before = dict.fromkeys(TAP_COUNTERS, 0)

    @property
    def key(self) -> tuple[str, object]:
        """The tap's name."""
        return "tap", self.name

    def register(self, roster: Roster[Any, Any, TapWorker]) -> None:
        """Enter it under its name."""
        roster.taps[self.name] = self

    def unregister(self, roster: Roster[Any, Any, Any]) -> None:
        """Remove it."""
        roster.taps.pop(self.name, None)

    def open(self) -> None:
        """Listen for interfaces. Raises WorkerError where no packet socket can be opened."""
        if (what := packet_socket.missing()) is not None:
            raise WorkerError(f"{self.title}: it needs {what}")
        self._links = Links()

    def close(self) -> None:
        """Follow no interface any more."""
        if self._links is not None:
            self._links.close()
            self._links = None

    def take_over(self, old: Self) -> None:
        """Begin anew, with counters that go on."""
        self.open()
        old.close()
        self.counters = old.counters
        self.restarts = old.restarts
        self._before = old.total()

    def release(self, successor: Self) -> None:
        """Nothing: what it had went with its process."""

    def differs(self, other: Self) -> bool:
        """By settings, or by an element's class or options."""
        return self.settings != other.settings or self.specs != other.specs or self.snap != other.snap

    @property
    def follows(self) -> dict[int, Callable[[], None]]:
        """The socket that tells of interfaces, and what is done then."""
        return {} if self._links is None else {self._links.fileno(): self._links_changed}

    def start(self) -> None:
        """Fork, and hand the sockets of all chosen interfaces over."""
        for followed in self._follower.followed.values():
            self._note(followed)
        self._follower = Follower(self._selection)
        super().start()
        assert self.child is not None
        handing.make_room(self.child.control)
        self._resume()

    def _resume(self) -> None:
        come, gone = self._follower.resume(links())
        self._apply(come, gone)

    def _links_changed(self) -> None:
        assert self._links is not None
        changes = self._links.changes()
        if self.child is None:
            return
        if changes is None:
            # Too many for the socket's buffer.
            self._resume()
            return
        for link, is_gone in changes:
            come, gone = self._follower.change(link, is_gone)
            self._apply([] if come is None else [come], [] if gone is None else [gone])

    def _apply(self, come: list[Followed], gone: list[Followed]) -> None:
        control = self.child.control if self.child is not None else None
        if control is None:
            return
        for followed in gone:
            self._note(followed)
            self._tell(control, f"gone {followed.link.index}", [])
        for followed in come:
            self.table.clear(followed.row)
            try:
                opened = packet_socket.open_tap(followed.link.index, self._filter, self.settings.ring)
            except OSError as error:
                self._follower.change(followed.link, gone=True)
                # One that went meanwhile will be told of.
                if followed.link.index in {link.index for link in links()}:
                    self._log(f"{self.title}: {followed.link.name} can't be watched: {error}", "error", tap=self.name)
                continue
            with opened:
                link = followed.link
                self._tell(control, f"add {link.index} {followed.row} {link.mtu}", [opened.fileno()])
        if come and self._follower.without_room:
            self._log(f"{self.title}: {self._follower.without_room} interfaces are not watched: too many", "error")

    def _tell(self, control: socket.socket, line: str, descriptors: list[int]) -> None:
        try:
            handing.give(control, line, descriptors)
        except OSError as error:
            # A worker that is gone is replaced, and the next one is told all.
            self._log(f"{self.title}: the worker was not told `{line}`: {error}", "warning", tap=self.name)

    def _note(self, followed: Followed) -> None:
        for column, count in self.table.read(followed.row).items():
            self._before[column] += count

    def total(self) -> dict[str, int]:
        """What all interfaces count, also those that are gone."""
        total = dict(self._before)
        for followed in self._follower.followed.values():
            for column, count in self.table.read(followed.row).items():
                total[column] += count
        return total

    def interfaces(self) -> list[tuple[Link, dict[str, int]]]:
        """The interfaces that are watched now, each with what it counts."""
        return [(each.link, self.table.read(each.row)) for each in self._follower.followed.values()]

    def body(self, control: socket.socket) -> None:
        """Show packets to the elements until told to stop."""
        try:
            bound_memory(self.settings.memory)
        except OSError as error:
            self._log(f"{self.title}: its memory could not be limited: {error}; it goes on without", "warning", tap=self.name)

        def emit(message: str, level: str = "info", **fields: Any) -> None:
            self._log(message, level, **{"tap": self.name, "instance": self._instance, **fields})

        tap = Tap(self._selection, self.settings.ring, self.table)
        handed = handing.Handed(control, {"add": (1, tap.add), "gone": (0, tap.gone)})
        chain = ElementChain([spec.cls(spec.name, spec.options, emit) for spec in self.specs], ACCEPT, monitor=True)
        settings = WorkerSettings(number=-1, default=ACCEPT, on_error=ACCEPT, monitor=True)
        WorkerLoop(tap, chain, settings, self.counters, handed, emit).run()

    @property
    def turns(self) -> int:
        """Turns of its loop so far, over all its processes."""
        return self.counters.turns
