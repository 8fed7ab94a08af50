"""The counters of one proxy: of this process, of those beside it, and of those that have ended."""

from __future__ import annotations

from typing import Final

from nfq_agent.counters import Slots
from nfq_agent.proxy.processes import Sibling

# What compiled pairs write, too: bytes from clients and from destinations, connections, and those that are open.
_SHARED: Final = ("bytes_forward", "bytes_reverse", "connections", "active")


class Tally:
    """Counts in plain Python, and writes what has changed into shared memory once a turn."""

    def __init__(self, slots: Slots, several: bool) -> None:
        """slots: counting continues from their values. several: whether other processes are counted with this one."""
        self._slots = slots
        self.counted = {**slots.snapshot(), "active": 0}
        # Bytes by direction; each pair adds to it.
        self.bytes = [self.counted["bytes_forward"], self.counted["bytes_reverse"]]
        self._several = several
        self._written: dict[str, int] = {}
        self._ended: dict[str, int] = {}

    @property
    def carried_in(self) -> tuple[memoryview, tuple[int, int, int, int]]:
        """The memory of the counters, and the places in it of those that compiled pairs write (PlainPairs.count_in)."""
        forward, reverse, connections, active = map(self._slots.names.index, _SHARED)
        return self._slots.memory, (forward, reverse, connections, active)

    def add(self, name: str) -> None:
        """One more."""
        self.counted[name] += 1

    def sibling_ended(self, sibling: Sibling) -> None:
        """A process beside this one has ended: its counts stay."""
        for name, value in sibling.counters.snapshot().items():
            self._ended[name] = self._ended.get(name, 0) + value

    def write(self, active: int, siblings: list[Sibling]) -> None:
        """Write what has changed since the last time. active: connections of this process."""
        counted = self.counted
        counted["active"] = active
        counted["bytes_forward"], counted["bytes_reverse"] = self.bytes
        written = self._written
        others = [sibling.counters.snapshot() for sibling in siblings]
        for name, value in counted.items():
            if self._several:
                value += self._ended.get(name, 0) + sum(other[name] for other in others)
            if written.get(name) != value or name in _SHARED:
                written[name] = value
                self._slots.set(name, value)
