"""What the workers of taps and inline links have in common: interfaces are found, passed to the process, and counted.

The supervisor opens what an interface needs, passes it to the worker and closes its own copy: it is released when the worker
ends.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self

from nfq_agent.capture import handing
from nfq_agent.capture.following import Followed, Follower, Table
from nfq_agent.capture.owners import InterfaceOwners, told
from nfq_agent.capture.serving import selection_of, unfit
from nfq_agent.capture.source import InterfaceSource
from nfq_agent.config.capture import CaptureConfig
from nfq_agent.config.drop_lines import drop_lines
from nfq_agent.config.models import Config
from nfq_agent.config.name_needs import name_needs
from nfq_agent.context import Context
from nfq_agent.counters import Counters
from nfq_agent.host import pairs
from nfq_agent.host.child import bound_memory
from nfq_agent.host.links import Link, Links, links
from nfq_agent.host.users import User
from nfq_agent.log import Log
from nfq_agent.service.confinement import Confinement, access_of
from nfq_agent.service.container_search import ContainerSearch, containers_of
from nfq_agent.service.control import state_folder
from nfq_agent.service.lending import lend, name_part
from nfq_agent.service.worker import Roster, Worker
from nfq_agent.service.worker_counts import WorkerCounts
from nfq_agent.values import MidstreamMode


class InterfaceWorker(Worker):
    """A worker that is fed from interfaces.

    kind: its table in the configuration. columns: what its process counts of each interface. midstream, copies: as in `Context`.
    """

    kind: str
    midstream: MidstreamMode = "accept"
    copies = False
    columns: tuple[str, ...]

    def __init__(
        self, name: str, table: CaptureConfig, config: Config, user: User, log: Log, close: Callable[[], Iterable[int]]
    ) -> None:
        super().__init__(user, log, close)
        self.title = f"{self.kind} {name}"
        self.name = name
        self.specs = config.packet_elements(table)
        self.drop_lines = drop_lines(config, table)
        self.confinement = Confinement(config.agent.confinement, access_of(self.specs))
        self.figures = WorkerCounts(self.specs)
        self.table = Table(self.columns)
        self.selection = selection_of(table)
        self.instance = config.agent.instance
        self.owners = InterfaceOwners()
        self.context = Context(owners=self.owners)
        self.names = name_needs(config) if any(map(name_part, self.specs)) else None
        self._memory = table.memory
        self._follower = Follower(self.selection)
        self._links: Links | None = None
        self._unfit: set[int] = set()
        # The counts of interfaces that are gone.
        self._before: dict[str, int] = {}
        self._containers = containers_of(config.agent.container_sockets, log)
        self._search = ContainerSearch(self._containers)

    @property
    def counters(self) -> Counters:
        """What its process counts."""
        return self.figures.counters

    @property
    def lent(self) -> Context:
        """In the process: what its elements are lent."""
        return replace(self.context, decisions=self.figures.decisions)

    @property
    def key(self) -> tuple[str, object]:
        """Its table's kind and name."""
        return self.kind, self.name

    def register(self, roster: Roster[Any, Any, Any]) -> None:
        """Enter it under its key."""
        roster.captures[self.kind, self.name] = self

    def unregister(self, roster: Roster[Any, Any, Any]) -> None:
        """Remove it."""
        roster.captures.pop((self.kind, self.name), None)

    def open(self) -> None:
        """Listen for interfaces."""
        self._links = Links()
        warn = partial(self._log, level="warning")
        midstream = self.midstream
        lent = lend(state_folder(), (self.instance, f"{self.kind}-{self.name}"), self.specs, midstream, self.names, warn)
        self.context = replace(lent, owners=self.owners, copies=self.copies)

    def close(self) -> None:
        """Stop following interfaces."""
        if self._links is not None:
            self._links.close()
            self._links = None

    def take_over(self, old: Self) -> None:
        """Start fresh where `old` ends; the counters continue."""
        self._before = old.total()
        old.close()
        self.open()
        self.figures = self.figures.after(old.figures)
        self.restarts = old.restarts

    def release(self, successor: Self) -> None:
        """Nothing to release: it ended with the process."""

    @property
    def follows(self) -> dict[int, Callable[[], None]]:
        """The socket that reports interfaces, and the function that reads it."""
        return {} if self._links is None else {self._links.fileno(): self._links_changed}

    def start(self) -> None:
        """Fork, and pass all chosen interfaces to the worker."""
        for followed in self._follower.followed.values():
            self._note(followed)
        self._follower = Follower(self.selection)
        self._search = ContainerSearch(self._containers)
        super().start()
        assert self.child is not None
        handing.make_room(self.child.control)
        self._resume()

    def _resume(self) -> None:
        come, gone = self._follower.resume(self._listed())
        self._apply(come, gone)

    def _listed(self) -> list[Link]:
        return [link for link in links() if self._fits(link)]

    def _fits(self, link: Link) -> bool:
        """Whether an interface can be taken. One that cannot although it is chosen is logged once."""
        # An agent's own pairs are never chosen, whatever the patterns say.
        if pairs.is_end(link):
            return False
        why = unfit(self.kind, link)
        if why is not None and link.index not in self._unfit and self.selection.chooses(link.name):
            self._unfit.add(link.index)
            self._log(f"{self.title}: {link.name} is not taken: {why}", "warning", **{self.kind: self.name})
        return why is None

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
            fits = self._fits(link)
            if is_gone:
                self._unfit.discard(link.index)
            if not fits:
                continue
            come, gone = self._follower.change(link, is_gone)
            self._apply([] if come is None else [come], [] if gone is None else [gone])

    def _apply(self, come: list[Followed], gone: list[Followed]) -> None:
        for followed in gone:
            self._tell(f"gone {followed.link.index}", [])
            self._search.gone(followed.link.index)
            self._note(followed)
            self.left(followed)
        for followed in come:
            self._search.seen(followed.link)
        self._name(self._search.found())
        for followed in come:
            self.table.clear(followed.row)
            try:
                self.enter(followed)
            except OSError as error:
                self._follower.change(followed.link, gone=True)
                # If the interface has disappeared, a message about it follows.
                if followed.link.index in {link.index for link in links()}:
                    self._log(f"{self.title}: {followed.link.name} cannot be taken: {error}", "error", **{self.kind: self.name})
        if come and self._follower.without_room:
            self._log(f"{self.title}: {self._follower.without_room} interfaces are not taken: too many", "error")

    @abstractmethod
    def enter(self, followed: Followed) -> None:
        """Open what an interface needs and pass it to the worker. Raises OSError."""

    def left(self, followed: Followed) -> None:
        """Forget an interface that is gone or no longer chosen."""

    def _tell(self, line: str, descriptors: Sequence[int]) -> None:
        if self.child is None:
            return
        try:
            handing.give(self.child.control, line, descriptors)
        except OSError as error:
            # A worker that is gone is replaced, and the next one is told all interfaces.
            self._log(f"{self.title}: the worker was not told `{line}`: {error}", "warning", **{self.kind: self.name})

    def counts(self, followed: Followed) -> dict[str, int]:
        """What one interface counts."""
        return self.table.read(followed.row)

    def _note(self, followed: Followed) -> None:
        for column, count in self.counts(followed).items():
            self._before[column] = self._before.get(column, 0) + count

    def total(self) -> dict[str, int]:
        """What all interfaces count, also those that are gone."""
        total = dict.fromkeys(self.columns, 0) | self._before
        for followed in self._follower.followed.values():
            for column, count in self.counts(followed).items():
                total[column] = total.get(column, 0) + count
        return total

    def interfaces(self) -> list[tuple[Link, str | None, dict[str, int]]]:
        """The interfaces that are taken now, each with its container, if that is known, and what it counts."""
        return [
            (each.link, self._search.named.get(each.link.index), self.counts(each)) for each in self._follower.followed.values()
        ]

    def words(self, source: InterfaceSource[Any], word: str, descriptors: int) -> dict[str, tuple[int, Callable[..., None]]]:
        """In the process: what the supervisor's lines call. word: of the line for an interface with its `descriptors`."""

        def gone(index: str) -> None:
            source.gone(index)
            self.owners.gone(index)

        return {word: (descriptors, source.add), "gone": (0, gone), "container": (0, self.owners.name)}

    def prepare(self) -> Callable[..., None]:
        """In the process: bound its memory. Returns the function that logs an event."""
        try:
            bound_memory(self._memory)
        except OSError as error:
            self._log(f"{self.title}: its memory could not be limited: {error}; it runs without a limit", "warning")

        def emit(message: str, level: str = "info", **fields: Any) -> None:
            self._log(message, level, **{self.kind: self.name, "instance": self.instance, **fields})

        return emit

    def _name(self, found: Mapping[int, str]) -> None:
        """Tell the worker the containers behind these interfaces."""
        for index, name in found.items():
            self._tell(told(index, name), [])
            interface = self._follower.followed[index].link.name
            self._log(f"{self.title}: {interface} is the interface of container {name}", "debug", container=name)

    def look(self) -> None:
        """Called now and then: look for containers that are not known yet."""
        if self.child is None:
            return
        for followed in self._follower.followed.values():
            # Its peer may have moved to its namespace since.
            self._search.seen(followed.link)
        self._name(self._search.later())
