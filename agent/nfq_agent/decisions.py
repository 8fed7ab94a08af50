"""How often each rule of a worker's elements decided, in memory that the worker shares with the supervisor. No I/O, no clock.

The rules are those of the configuration, so that traffic makes no new numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from nfq_agent.counters import Slots

# Numbers of one worker. Rules beyond them are counted together, as OTHERS.
MOST: Final = 400
OTHERS: Final = "other rules"


class Decisions(Slots):
    """Counts decisions by element and rule.

    rules: pairs of the element's name and the rule's label, as `PacketElement.rule` gives them. A decision is counted when it is
    made, not for each packet that it applies to.
    """

    def __init__(self, rules: Iterable[tuple[str, str]] = (), memory: memoryview | None = None) -> None:
        names = tuple(dict.fromkeys(f"{element}: {rule}" for element, rule in rules))
        super().__init__(names if len(names) <= MOST else (*names[: MOST - 1], OTHERS), memory)

    def place(self, reason: str) -> int:
        """The number of a rule, by its element and label as in `reason` of a flow; -1 for one that is not counted."""
        found = self._index.get(reason)
        return self._index.get(OTHERS, -1) if found is None else found

    def count(self, element: str, rule: str) -> None:
        """One more decision of a rule."""
        place = self.place(f"{element}: {rule}")
        if place >= 0:
            self._slots[place] += 1

    @property
    def room(self) -> memoryview:
        """The numbers, for compiled code, by `place`."""
        return self._slots


def element_and_rule(reason: str) -> tuple[str, str]:
    """The element that decided, and its rule; no rule if the element has none."""
    element, _, rule = reason.partition(": ")
    return element, rule


def split(name: str) -> tuple[str, str]:
    """The element and the rule of a counter's name; no element for rules that are counted together."""
    element, rule = element_and_rule(name)
    return (element, rule) if rule else ("", element)
