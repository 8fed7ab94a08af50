"""What one worker counts, in one piece of memory that it shares with the supervisor: counters, latency, decisions of rules."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Self

from nfq_agent.config.models import ElementSpec
from nfq_agent.counters import Counters, Slots
from nfq_agent.decisions import Decisions
from nfq_agent.host.memory import SharedNumbers
from nfq_agent.latency import SIZE, Latency

# Bytes from the start of the memory. A test compares them with the sizes of the tables, and with what SharedNumbers has room for.
LATENCY: Final = 8 * 64
DECISIONS: Final = LATENCY + 8 * 16
assert SIZE <= 16


class WorkerCounts:
    """memory: of SharedNumbers, or None for memory that lasts as long as this object and its children."""

    def __init__(self, specs: Iterable[ElementSpec], memory: memoryview | None = None) -> None:
        room = memoryview(mmap.mmap(-1, mmap.PAGESIZE)) if memory is None else memory
        rules = [(spec.name, rule) for spec in specs for rule in spec.cls.rules_of(spec.options)]
        self.counters = Counters(room)
        self.latency = Latency(room[LATENCY:])
        self.decisions = Decisions(rules, room[DECISIONS:])

    @property
    def noted(self) -> dict[str, Any]:
        """The layout, for the next agent."""
        return {"counters": self.counters.names, "latency": self.latency.names, "decisions": self.decisions.names}

    def fits(self, noted: Mapping[str, Any]) -> bool:
        """Whether memory with this layout can be used as it is."""
        return all(tuple(noted.get(name, ())) == names for name, names in self.noted.items())

    def continue_from(self, former: FormerCounts | Self) -> None:
        """Continue other numbers, as far as they have the same names."""
        for own, other in zip(
            (self.counters, self.latency, self.decisions), (former.counters, former.latency, former.decisions), strict=True
        ):
            own.become(other.snapshot())

    def after(self, old: Self) -> Self:
        """Those of a worker that is replaced; with other rules, what has the same name keeps its number."""
        if self.decisions.names == old.decisions.names:
            return old
        self.continue_from(old)
        return self


class FormerCounts:
    """The numbers of a worker of the previous agent. noted: their layout; an older agent had counters alone."""

    def __init__(self, noted: Mapping[str, Sequence[str]], memory: memoryview) -> None:
        self.counters, self.latency, self.decisions = (
            Slots(tuple(noted.get(name, ())), memory[start:])
            for name, start in (("counters", 0), ("latency", LATENCY), ("decisions", DECISIONS))
        )


class LastingCounts(WorkerCounts):
    """The same in memory that outlives the agent: the next one takes its descriptor."""

    def __init__(self, specs: Sequence[ElementSpec], memory: SharedNumbers | None = None) -> None:
        self._specs = specs
        self._memory = SharedNumbers() if memory is None else memory
        super().__init__(specs, self._memory.numbers)
        # What an earlier process counted in memory of another layout.
        self._former: FormerCounts | None = None

    def fileno(self) -> int:
        """The descriptor that keeps the memory."""
        return self._memory.fileno()

    def inherited(self, descriptor: int, noted: Mapping[str, Any]) -> LastingCounts:
        """The counts of the previous agent; these ones, until `count_on`, where its layout differs."""
        memory = SharedNumbers(descriptor)
        if self.fits(noted):
            return LastingCounts(self._specs, memory)
        self._former = FormerCounts(noted, memory.numbers)
        return self

    def count_on(self) -> None:
        """Take over what the predecessor counted, now that it has stopped counting."""
        if self._former is not None:
            self.continue_from(self._former)
            self._former = None
