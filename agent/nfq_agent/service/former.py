"""A process of a proxy that takes nothing new and finishes its connections, also beyond the end of the agent that started it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from nfq_agent.counters import Slots
from nfq_agent.host.child import Child
from nfq_agent.host.memory import SharedNumbers
from nfq_agent.service.store import Store


class Former:
    """One such process and what it counts."""

    def __init__(self, proxy: str, child: Child, memory: SharedNumbers, counters: Slots) -> None:
        self.child = child
        self.counters = counters
        self._proxy = proxy
        self._memory = memory

    @property
    def name(self) -> str:
        """By which its control socket is stored, and what is known of it noted."""
        return f"leaving-{self._proxy}-{self.child.pid}"

    @property
    def stored(self) -> dict[str, tuple[int, bool]]:
        """What the next agent is to get (see Worker)."""
        return {
            self.name: (self.child.control.fileno(), True),
            f"tallied-{self._proxy}-{self.child.pid}": (self._memory.fileno(), False),
        }

    @property
    def noted(self) -> dict[str, Any]:
        """What the next agent needs to know (see Worker)."""
        return {"process": self.child.identity, "counters": self.counters.names}

    @classmethod
    def inherited(cls, proxy: str, store: Store) -> tuple[list[Self], dict[str, int]]:
        """Those that the previous agent left; and the counts of those that have ended since."""
        found = []
        ended: dict[str, int] = {}
        names = {name.partition("-")[2] for kind in ("leaving", "tallied") for name in store.waiting(f"{kind}-{proxy}-")}
        for name in sorted(each for each in names if each.removeprefix(f"{proxy}-").isdecimal()):
            noted = store.noted(f"leaving-{name}")
            control, memory = store.take(f"leaving-{name}"), store.take(f"tallied-{name}")
            child = Child.adopted(f"proxy {proxy}", control, noted.get("process"))
            shared = SharedNumbers(memory)
            counters = Slots(tuple(noted.get("counters", ())), shared.numbers)
            if child is not None:
                found.append(cls(proxy, child, shared, counters))
                continue
            add_up(ended, counters.snapshot())
            for each in (f"leaving-{name}", f"tallied-{name}"):
                store.drop(each)
            store.note(f"leaving-{name}", None)
        return found, ended


def add_up(total: dict[str, int], counts: Mapping[str, int]) -> None:
    """Add what a process counted that has ended: it has no connection any more."""
    for name, value in counts.items():
        total[name] = total.get(name, 0) + (0 if name == "active" else value)
