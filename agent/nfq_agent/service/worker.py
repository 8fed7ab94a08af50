"""A worker: one child process of the supervisor that is replaced when it dies."""

from __future__ import annotations

import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Generic, Self, TypeVar

from nfq_agent.flow_ring import FlowRing
from nfq_agent.host.child import STOP, Child, NotReady
from nfq_agent.host.pulse import Progress, Pulse
from nfq_agent.host.users import CAP_NET_ADMIN, User
from nfq_agent.log import Log
from nfq_agent.service.order import Order
from nfq_agent.service.restarts import WITHIN, Deaths
from nfq_agent.service.store import Store

if TYPE_CHECKING:
    from nfq_agent.packet import Packet

READY_WITHIN: Final = 10.0
STOP_WITHIN: Final = 2.0
Q = TypeVar("Q", bound="Worker")
P = TypeVar("P", bound="Worker")
T = TypeVar("T", bound="Worker")


def judged_now(_: Packet) -> float:
    """When a packet is judged, in seconds of the monotonic clock: its turn may have begun before it came."""
    return time.monotonic()


class WorkerError(Exception):
    """A worker does not start, or keeps dying."""


@dataclass(frozen=True, slots=True)
class Roster(Generic[Q, P, T]):
    """The workers that serve: those of queues by number, those of proxies by name, those of interfaces by kind and name."""

    queues: dict[int, Q] = field(default_factory=dict)
    proxies: dict[str, P] = field(default_factory=dict)
    captures: dict[tuple[str, str], T] = field(default_factory=dict)


class Worker(ABC):
    """One child process that is replaced when it dies.

    title: for messages. lingers: without a supervisor it continues until no packet comes any more. drains: when it is told to
    end, it finishes its connections while a successor serves. ends_within: seconds that it may take to end. last_word: what tells
    it to end. capabilities: those that its process has.
    """

    title: str
    drains = False
    lingers = False
    ends_within = STOP_WITHIN
    last_word = STOP
    capabilities: tuple[int, ...] = (CAP_NET_ADMIN,)

    def __init__(self, user: User, log: Log, close: Callable[[], Iterable[int]]) -> None:
        """close: descriptors of the parent that a child must not keep open."""
        self.child: Child | None = None
        self.deaths = Deaths()
        self.restarts = 0
        # It did not stop in time: it may have left packets unanswered, as after a death, but the death is not counted.
        self.killed = False
        self.restart_at: float | None = None
        self.predecessor: Child | None = None
        """The process of the previous agent that serves until this worker takes over."""
        self.waits = False
        """Its process is to wait for an order when it is ready."""
        self._user = user
        self._log = log
        self._close = close
        # The child calls `pulse.beat` at least once a second.
        self.pulse = Pulse()
        self._progress = Progress()
        # What its process reports about flows while it is watched.
        self.ring = FlowRing()

    @property
    @abstractmethod
    def key(self) -> tuple[str, object]:
        """What it serves: two workers of one key serve the same."""

    @abstractmethod
    def register(self, roster: Roster[Any, Any, Any]) -> None:
        """Enter this worker as the one that serves its queue or proxy."""

    @abstractmethod
    def unregister(self, roster: Roster[Any, Any, Any]) -> None:
        """Remove it, if it is there."""

    @abstractmethod
    def open(self) -> None:
        """Open what it serves: bind a queue, listen. Raises QueueError or OSError."""

    @abstractmethod
    def close(self) -> None:
        """Close what it serves."""

    @abstractmethod
    def take_over(self, old: Self) -> None:
        """Take over what `old` has open, and apply this worker's settings to it. Raises QueueError or OSError."""

    @abstractmethod
    def release(self, successor: Self) -> None:
        """Close what `successor`, which serves now, did not take over."""

    @abstractmethod
    def differs(self, other: Self) -> bool:
        """Whether the settings of `other` need another process."""

    @abstractmethod
    def body(self, control: socket.socket) -> None:
        """What the child does."""

    def inherit(self, store: Store) -> bool:
        """Take what the previous agent had open, in place of `open`. False if there is nothing. Raises OSError."""
        del store
        return False

    @property
    def stored(self) -> dict[str, tuple[int, bool]]:
        """What the next agent is to get: names with descriptors, and whether to keep each only until its other end is closed."""
        return {}

    @property
    def noted(self) -> dict[str, dict[str, Any]]:
        """What the next agent needs to know besides: names with objects for JSON."""
        return {}

    @property
    def formers(self) -> list[Child]:
        """Earlier processes of it that finish what they have."""
        return []

    def former_ended(self) -> None:  # noqa: B027  # most have none
        """One of the earlier processes has ended."""

    def abandon(self) -> None:
        """After `inherit`: leave everything as it is to the agent that comes next."""
        if self.predecessor is not None:
            self.predecessor.leave()
            self.predecessor = None

    @property
    def keeps(self) -> set[int]:
        """Descriptors that its process needs, although they are among those that a child must not keep open."""
        return set()

    @property
    def follows(self) -> dict[int, Callable[[], None]]:
        """Descriptors that the supervisor's side of this worker reads, each with the function to call when it is readable."""
        return {}

    def look(self) -> None:  # noqa: B027  # most have nothing to look for
        """Called once a second in the supervisor."""

    @property
    def waiting(self) -> bool:
        """Whether a packet waits for its verdict. False where the kernel does not show it."""
        return False

    @property
    def pid(self) -> int | None:
        """The process that serves now, or None."""
        return None if self.child is None else self.child.pid

    def stuck_for(self, now: float) -> float:
        """Seconds without progress, in time of the process's own. now: seconds of the monotonic clock."""
        if self.child is None or not (self.child.ready or self.deaths):
            self._progress.restart()
            return 0.0
        return self._progress.stuck_for(self.pulse.beats, self.child.pid, now)

    def start(self) -> None:
        """Fork the process; `wait_ready` waits until it serves. Raises OSError."""
        self.restart_at = None
        self._progress.restart()
        others = set(self._close()) - self.keeps
        self.child = Child(self.title, self._live, self._user, self.capabilities, others)

    def begin(self, order: Order) -> None:
        """Tell its process, which waits, to serve."""
        assert self.child is not None
        self.waits = False
        self.child.tell(order.line)

    def _live(self, control: socket.socket) -> None:
        # From here on the process is ended if it hangs, also when nothing watches it any more.
        self.pulse.beat()
        self.body(control)

    def wait_ready(self, beat: Callable[[], None], within: float = READY_WITHIN) -> None:
        """Return once it serves. beat: called now and then while it waits. Raises WorkerError if it ends, or takes too long."""
        assert self.child is not None
        try:
            self.child.wait_ready(within, beat)
        except NotReady as error:
            if self.child.exit is not None:
                self.child = None
            raise WorkerError(str(error)) from error

    def died(self) -> str:
        """Reap it and set the time of the next start. Returns how it ended. Raises WorkerError when it has died too often."""
        child = self.child
        assert child is not None
        child.reap(block=True)
        self.child = None
        now = time.monotonic()
        pause = self.deaths.add(now)
        if pause is None:
            often = self.deaths.recent(now)
            raise WorkerError(f"{self.title} died {often} times within {WITHIN:g} s, the last time by {child.how_it_ended}")
        self.restart_at = now + pause
        self.restarts += 1
        return child.how_it_ended

    def stop(self) -> None:
        """Tell it to answer what it holds and to end; kill it if it does not end within STOP_WITHIN seconds."""
        self.restart_at = None
        child = self.child
        if child is None:
            return
        child.tell(STOP)
        if not child.wait_end(STOP_WITHIN):
            self._log(f"{self.title} did not stop within {STOP_WITHIN:g} s and was killed", "warning", worker=self.title)
            child.kill()
            self.killed = True
        child.reap(block=True)
        self.child = None

    def set_aside(self) -> Child | None:
        """Return the process, which drains and no longer belongs to this worker; None if there is none."""
        child, self.child, self.restart_at = self.child, None, None
        return child
