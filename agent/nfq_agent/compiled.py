"""Elements in a compiled form (nfq_agent.steps), for chains in which each element has one. No I/O, no clock.

Packets then reach Python only where an element has something to do with them, as `log` has for a line that is due.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from nfq_agent.flow import Flow
from nfq_agent.packet import Packet
from nfq_agent.steps import MOST, Step, Steps
from nfq_agent.verdict import ACCEPT, Verdict


class Compilable:
    """The part of an element (nfq_agent.element) that gives its compiled form."""

    name: str
    judged: Callable[..., Any]

    def compiled(self) -> Step | None:
        """The step that answers, and hears, as `decide` and `judged` do, on the same state; None if there is none.

        It counts only where the class of the element itself defines it: a subclass may do something else.
        """
        return None

    def tell(self, packet: Packet, flow: Flow | None, verdict: Verdict) -> None:
        """Called for a packet that the step has chosen (H_TELL), after its verdict was given."""
        self.judged(packet, flow, verdict)


class Compiled:
    """The compiled form of a chain. steps: it. Of the elements it keeps those that may have to be told of packets."""

    def __init__(self, elements: Sequence[Compilable], steps: Sequence[Step], monitor: bool) -> None:
        self._elements = tuple(elements)
        self.steps = Steps(steps, monitor)

    def tell(self, packet: Packet, verdict: Verdict, which: int) -> None:
        """Tell elements of a packet. which: a bit for each."""
        for place, element in enumerate(self._elements):
            if which >> place & 1:
                element.tell(packet, None, verdict)


def compiled_of(
    elements: Sequence[Compilable], default: Verdict, monitor: bool, own_lines: Collection[str] | None
) -> Compiled | None:
    """The compiled form of these elements; None where one has none, or dropped packets have to be shown.

    own_lines: the elements that log their drops themselves; None where no drop is logged.
    """
    if default is not ACCEPT or not 1 <= len(elements) <= MOST:
        return None
    steps = []
    for element in elements:
        step = element.compiled() if "compiled" in vars(type(element)) else None
        if step is None or (step.drops and own_lines is not None and element.name not in own_lines):
            return None
        steps.append(step)
    return Compiled(elements, steps, monitor)
