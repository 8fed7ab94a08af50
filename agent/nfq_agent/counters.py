"""What processes count, in memory that they share with the supervisor: it outlives them and is read without asking them.

A counter and its meaning are one line here; the status, its JSON and docs/verbs.md follow from it.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from typing import Final, overload

from nfq_agent.verdict import Action


def growth(count: int, before: int) -> int:
    """How much a counter has grown since it was `before`; its whole value if it began again from zero."""
    return count - before if count >= before else count


class Slots:
    """Numbers of 64 bits by name, made before the fork; one process writes them, others read."""

    def __init__(self, names: Sequence[str], memory: memoryview | None = None) -> None:
        """memory: where they are, for processes that do not fork from this one; as it is, it holds the numbers already."""
        self.names = tuple(names)
        # Anonymous and shared: the children of a fork write into the same pages.
        self._memory = memoryview(mmap.mmap(-1, max(8 * len(self.names), 1))) if memory is None else memory
        self._slots = self._memory[: 8 * len(self.names)].cast("Q") if self.names else memoryview(b"")
        self._index = {name: index for index, name in enumerate(self.names)}

    @property
    def memory(self) -> memoryview:
        """Where they are, 8 bytes each in the order of their names, for compiled code."""
        return self._memory

    def set(self, name: str, value: int) -> None:
        """Write one. Raises KeyError for a name that was not given."""
        self._slots[self._index[name]] = value & 0xFFFF_FFFF_FFFF_FFFF

    def become(self, others: Mapping[str, int]) -> None:
        """Continue from these numbers, as far as they are known here by name."""
        for name in self._index.keys() & others.keys():
            self.set(name, others[name])

    def snapshot(self) -> dict[str, int]:
        """All of them now, by name. Each number is whole; they may be of different moments."""
        return {name: self._slots[index] for name, index in self._index.items()}


class Count:
    """One slot of `Counters`, read and written as an attribute.

    internal: not part of the status. action: the kind of verdict that it counts.
    """

    def __init__(self, meaning: str, internal: bool = False, action: Action | None = None) -> None:
        self.meaning = meaning
        self.internal = internal
        self.action = action
        self.index = -1

    @overload
    def __get__(self, counters: None, owner: type) -> Count: ...
    @overload
    def __get__(self, counters: Counters, owner: type) -> int: ...
    def __get__(self, counters: Counters | None, owner: type) -> int | Count:
        return self if counters is None else counters._slots[self.index]  # noqa: SLF001  # its own class

    def __set__(self, counters: Counters, value: int) -> None:
        counters._slots[self.index] = value & 0xFFFF_FFFF_FFFF_FFFF  # noqa: SLF001  # its own class


class Counters(Slots):
    """What the worker of a queue counts, once per turn of its loop."""

    received = Count("packets read from the queue")
    known_received = Count("of these, packets of flows that were answered before, from the second queue (room_for_known)")
    cut = Count("packets of many datagrams (UDP_SEGMENT) that were cut, and read one datagram each")
    accepted = Count("verdicts ACCEPT", action=Action.ACCEPT)
    dropped = Count("verdicts DROP", action=Action.DROP)
    repeated = Count("verdicts REPEAT", action=Action.REPEAT)
    unmarked = Count("packets that came back without the mark of a REPEAT too often, and got the verdict that it stands for")
    requeued = Count("verdicts QUEUE: packets sent to another queue", action=Action.QUEUE)
    retained = Count("packets kept for a later answer", action=Action.RETAIN)
    rewritten = Count("verdicts with a new payload")
    marked = Count("verdicts with a mark")
    errors = Count("an element raised, or gave an invalid verdict")
    malformed = Count("packets whose headers could not be decoded")
    would_drop = Count("drops that monitor mode turned into accepts")
    lost = Count("packets that a worker had taken when it died, queued again or answered with on_error; an upper bound")
    enobufs = Count("messages that did not fit into the socket's buffer, since the queue was opened")
    turns = Count("turns of the loop", internal=True)
    heartbeat = Count("when the latest turn ended, in nanoseconds of the monotonic clock", internal=True)
    last_id = Count("number of the latest packet read", internal=True)
    known_last_id = Count("number of the latest packet read from the second queue", internal=True)
    known_lost = Count("of those lost, packets of the second queue", internal=True)
    log_suppressed = Count("log lines suppressed by a rate limit")
    flows = Count("flows in the table now")
    flows_evicted = Count("flows removed from the table by age, or because it was full")
    cached = Count("verdicts known from the five-tuple")
    programs_skipped = Count("flows whose program (`exe`) was not looked for, since such searches had taken too much time")
    unanswered = Count("retained packets that ran out of time, answered with on_error")

    def __init__(self, memory: memoryview | None = None) -> None:
        super().__init__(tuple(_COUNTS), memory)

    def skip_program(self) -> None:
        """One more program was not looked for."""
        self.programs_skipped += 1

    def suppress(self, count: int = 1) -> None:
        """So many more lines of the log were not written."""
        self.log_suppressed += count


_COUNTS: Final[Mapping[str, Count]] = {name: each for name, each in vars(Counters).items() if isinstance(each, Count)}
for _place, _count in enumerate(_COUNTS.values()):
    _count.index = _place

# The counter of each kind of verdict.
VERDICT_COUNTERS: Final[Mapping[Action, str]] = {each.action: name for name, each in _COUNTS.items() if each.action is not None}
# The counters of the status, and what each counts.
WORKER_COUNTERS: Final[Mapping[str, str]] = {name: each.meaning for name, each in _COUNTS.items() if not each.internal}
PROXY_COUNTERS: Final[Mapping[str, str]] = {
    "connections": "connections taken",
    "active": "connections that are open now",
    "refused": "connections without a known destination, to our own listener, beyond `max_per_source`, or refused by an element",
    "failed_upstream": "connections whose destination could not be reached",
    "reset": "connections ended by a reset of either side, by an element, by a deadline, or at the end of the drain time",
    "timed_out": "connections ended because they were silent for too long",
    "full": "times when `max_connections` was reached, and further connections had to wait",
    "element_errors": "an element raised, or gave an invalid answer",
    "bytes_forward": "bytes received from clients",
    "bytes_reverse": "bytes received from destinations",
}
TAP_COUNTERS: Final[Mapping[str, str]] = {
    "judged": "packets shown to the elements",
    "would_drop": "of these, packets that an inline link would have dropped",
    "lost": "frames for which the ring had no room",
    "fragments": "later fragments, not judged because ports are chosen",
    "unreadable": "frames in which no IP packet was found",
}
INLINE_COUNTERS: Final[Mapping[str, str]] = {
    "up": "packets that went to the worker",
    "judged": "packets that got their verdict there",
    "dropped": "of these, dropped",
    "would_drop": "of these, drops that monitor mode turned into accepts",
    "decided_accepted": "packets of decided flows that the kernel accepted",
    "decided_dropped": "packets of decided flows that the kernel dropped",
    "past_stale": "packets that passed because the worker showed no sign of life",
    "past_full": "packets that passed because too many waited",
    "past_tagged": "packets that passed because of a VLAN tag",
    "past_fragments": "later fragments, which pass",
    "past_unread": "packets that passed because their headers could not be read",
}
