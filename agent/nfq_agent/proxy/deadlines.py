"""Which connections have been silent for too long: events and times come in, connections to end come out. No I/O, no clock.

Most connections are short. A new one is only noted; it is checked when the shortest limit has passed, and then whenever one of
its limits may have passed.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

# How soon a connection is checked again while an element holds its bytes back.
_LOOK_AGAIN: Final = 1.0


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds; 0 means no limit.

    opening: until the first byte has been carried, either way. idle: without a byte either way. client, server: that one side
    neither sends nor takes a byte. full: as idle, while no further connection can be accepted.
    """

    opening: float = 60.0
    idle: float = 3600.0
    client: float = 3600.0
    server: float = 3600.0
    full: float = 60.0

    @property
    def shortest(self) -> float:
        """The earliest limit that can apply to a connection; 0 if there is none."""
        return min((each for each in (self.opening, self.idle, self.client, self.server) if each), default=0.0)


class Watched(Protocol):
    """What is known of a connection: when it began, and when each side last sent or took a byte."""

    @property
    def opened(self) -> float: ...
    @property
    def client_active(self) -> float: ...
    @property
    def server_active(self) -> float: ...
    @property
    def carried(self) -> bool:
        """Whether a byte has reached the other side."""

    @property
    def waiting(self) -> bool:
        """Whether an element holds bytes back until a time that it has set."""


K = TypeVar("K", bound=Watched)


class Expired(NamedTuple, Generic[K]):
    """End this connection. reason: for the log."""

    key: K
    reason: str


class Deadlines(Generic[K]):
    """The deadlines of the connections of one process."""

    def __init__(self, timeouts: Timeouts) -> None:
        self._timeouts = timeouts
        self.first = timeouts.shortest
        # New ones with the time of their first look: in that order, since all have the same time. Plain pairs that connect by
        # themselves write theirs here.
        self.new: dict[K, float] = {}
        # (time of the next look, order, connection) of those that were looked at; `_old` has those that still run.
        self._looks: list[tuple[float, int, K]] = []
        self._old: set[K] = set()
        self._order = 0

    def __len__(self) -> int:
        return len(self.new) + len(self._old)

    def opened(self, key: K, now: float) -> None:
        """A new connection."""
        self.new[key] = now + self.first

    def gone(self, key: K) -> None:
        """A connection has ended."""
        if self.new.pop(key, None) is None:
            self._old.discard(key)
            # An entry for a time far ahead must not keep an ended connection.
            if len(self._looks) > 64 + 2 * len(self._old):
                self._looks = [look for look in self._looks if look[2] in self._old]
                heapq.heapify(self._looks)

    @property
    def due(self) -> float | None:
        """When `woken` is to be called next; None if nothing is watched."""
        if not self.first:
            return None
        first = next(iter(self.new.values()), None)
        look = self._looks[0][0] if self._looks else None
        return min((each for each in (first, look) if each is not None), default=None)

    def woken(self, now: float) -> tuple[list[K], list[Expired[K]]]:
        """Time has passed: returns the connections that are due for their first check, and those that are to end."""
        lasting: list[K] = []
        expired: list[Expired[K]] = []
        if not self.first:
            return lasting, expired
        for key, first in self.new.items():
            if first > now:
                break
            lasting.append(key)
        for key in lasting:
            del self.new[key]
            self._old.add(key)
            self._look(key, now, expired)
        while self._looks and self._looks[0][0] <= now:
            _, _, key = heapq.heappop(self._looks)
            if key in self._old:
                self._look(key, now, expired)
        return lasting, expired

    def crowded(self, now: float) -> list[Expired[K]]:
        """The proxy is full: returns the connections that have been idle for the limit that applies then."""
        limit = self._timeouts.full
        if not limit:
            return []
        return [
            Expired(key, f"no byte either way for {limit:g} s, while the proxy was full")
            for keys in (self.new, self._old)
            for key in keys
            if not key.waiting and max(key.client_active, key.server_active) + limit <= now
        ]

    def _look(self, key: K, now: float, expired: list[Expired[K]]) -> None:
        due, reason = self._deadline(key)
        if due <= now and not key.waiting:
            self._old.discard(key)
            expired.append(Expired(key, reason))
            return
        self._order += 1
        heapq.heappush(self._looks, (max(due, now + _LOOK_AGAIN) if key.waiting else due, self._order, key))

    def _deadline(self, key: K) -> tuple[float, str]:
        """The deadline of a connection, and its reason."""
        limits = self._timeouts
        client, server = key.client_active, key.server_active
        deadlines = []
        if limits.opening and not key.carried:
            deadlines.append((key.opened + limits.opening, f"no byte was carried within {limits.opening:g} s"))
        if limits.idle:
            deadlines.append((max(client, server) + limits.idle, f"no byte either way for {limits.idle:g} s"))
        if limits.client:
            deadlines.append((client + limits.client, f"the client sent and took no byte for {limits.client:g} s"))
        if limits.server:
            deadlines.append((server + limits.server, f"the server sent and took no byte for {limits.server:g} s"))
        # With only `opening` set, one that has carried a byte has no deadline any more.
        return min(deadlines, default=(float("inf"), ""))
