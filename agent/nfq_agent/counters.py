"""What a worker counts, in memory that it shares with the supervisor: it survives the worker, and nobody has to ask for it."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Final, overload

NAMES: Final = (
    "received", "accepted", "dropped", "repeated", "requeued", "retained", "rewritten", "marked", "errors", "malformed",
    "would_drop", "lost", "enobufs", "turns", "heartbeat", "last_id", "log_held", "flows", "flows_evicted", "cached",
    "unanswered",
)  # fmt: skip


class Slots:
    """Numbers of 64 bits by name, made before the fork; one process writes them, others read."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        # Anonymous and shared: the children of a fork write into the same pages.
        self._memory = mmap.mmap(-1, max(8 * len(self.names), 1))
        self._slots = memoryview(self._memory).cast("Q")[: len(self.names)] if self.names else memoryview(b"")
        self._index = {name: index for index, name in enumerate(self.names)}

    def set(self, name: str, value: int) -> None:
        """Write one. Raises KeyError for a name that was not given."""
        self._slots[self._index[name]] = value & 0xFFFF_FFFF_FFFF_FFFF

    def snapshot(self) -> dict[str, int]:
        """All of them now, by name. Each number is whole; they need not be of the same moment."""
        return {name: self._slots[index] for name, index in self._index.items()}


class _Count:
    """One slot of `Counters`, read and written as an attribute."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._index = NAMES.index(name)

    @overload
    def __get__(self, counters: None, owner: type) -> _Count: ...
    @overload
    def __get__(self, counters: Counters, owner: type) -> int: ...
    def __get__(self, counters: Counters | None, owner: type) -> int | _Count:
        return self if counters is None else counters._slots[self._index]  # noqa: SLF001  # its own class

    def __set__(self, counters: Counters, value: int) -> None:
        counters._slots[self._index] = value & 0xFFFF_FFFF_FFFF_FFFF  # noqa: SLF001  # its own class


class Counters(Slots):
    """What the worker of a queue counts, once per turn of its loop.

    received: packets read. accepted, dropped, repeated, requeued: verdicts given, the last two for REPEAT and QUEUE.
    retained: packets kept for a later answer. rewritten, marked: verdicts with a new payload, with a mark. errors: an element
    raised, or answered what can't be given. malformed: the headers could not be decoded. would_drop: drops that monitor mode
    turned into accepts. lost: packets that a worker had taken when it died, answered by its successor; at most so many, since
    a number that the kernel gave to a packet and could not deliver is among them. enobufs: messages that did not fit into the
    socket's buffer since the queue was opened. turns: rounds of the loop. heartbeat: when the latest ended, nanoseconds of the
    monotonic clock. last_id: number of the latest packet read. log_held: lines about errors that were held back. flows: in the
    table now; flows_evicted: forgotten. cached: verdicts known from the five-tuple. unanswered: retained too long, and
    answered by policy.
    """

    received = _Count()
    accepted = _Count()
    dropped = _Count()
    repeated = _Count()
    requeued = _Count()
    retained = _Count()
    rewritten = _Count()
    marked = _Count()
    errors = _Count()
    malformed = _Count()
    would_drop = _Count()
    lost = _Count()
    enobufs = _Count()
    turns = _Count()
    heartbeat = _Count()
    last_id = _Count()
    log_held = _Count()
    flows = _Count()
    flows_evicted = _Count()
    cached = _Count()
    unanswered = _Count()

    def __init__(self) -> None:
        super().__init__(NAMES)
