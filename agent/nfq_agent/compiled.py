"""Elements in a compiled form (nfq_agent.steps), for chains in which each element has one. No I/O, no clock.

Packets then reach Python only where an element has something to do with them, as `log` has for a line that is due.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from nfq_agent.flow import Flow
from nfq_agent.flow_steps import FlowSteps
from nfq_agent.flow_table import FlowTable
from nfq_agent.packet import Packet
from nfq_agent.step_chain import MOST, Steps
from nfq_agent.steps import Die, Step
from nfq_agent.verdict import ACCEPT, Verdict


class Compilable:
    """The part of an element (nfq_agent.element) that gives its compiled form."""

    name: str
    judged: Callable[..., Any]

    def compiled(self) -> Step | None:
        """The step that does what `decide` and `judged` do, on the same state; None if there is none.

        It counts only where the class of the element itself defines it: a subclass may do something else.
        """
        return None

    def tell(self, packet: Packet, flow: Flow | None, verdict: Verdict) -> None:
        """Called for a packet that the step has chosen (H_TELL), after its verdict was given."""
        self.judged(packet, flow, verdict)


class Compiled:
    """The compiled form of a chain. steps: it. Of the elements it keeps those that may need to see packets."""

    def __init__(self, elements: Sequence[Compilable], steps: Steps) -> None:
        self._elements = tuple(elements)
        self.steps = steps

    def tell(self, packet: Packet, flow: Flow | None, verdict: Verdict, which: int) -> None:
        """Tell elements of a packet. which: a bit for each."""
        for place, element in enumerate(self._elements):
            if which >> place & 1:
                element.tell(packet, flow, verdict)


def step_of(element: Compilable) -> Step | None:
    """The compiled form of an element; None if it has none."""
    return element.compiled() if "compiled" in vars(type(element)) else None


def _drops_unseen(elements: Sequence[Compilable], steps: Sequence[Step], own_lines: Collection[str] | None) -> bool:
    """Whether a step may drop a packet that has to be shown, so that its drop is logged. Those that can show them do so then."""
    if own_lines is None:
        return False
    without = [step for element, step in zip(elements, steps, strict=True) if step.drops and element.name not in own_lines]
    return not all(step.show_drops() for step in without)


def compiled_of(
    elements: Sequence[Compilable], default: Verdict, monitor: bool, own_lines: Collection[str] | None
) -> Compiled | None:
    """The compiled form of these elements; None where one has none, or dropped packets have to be shown.

    own_lines: the elements that log their drops themselves; None where no drop is logged.
    """
    if default is not ACCEPT or not 1 <= len(elements) <= MOST:
        return None
    steps = [step for element in elements if (step := step_of(element)) is not None]
    if len(steps) < len(elements) or _drops_unseen(elements, steps, own_lines):
        return None
    return Compiled(elements, Steps(steps, monitor))


def compiled_beside(
    steps: Mapping[Any, Step], table: FlowTable, first: bool, monitor: bool, own_lines: Collection[str] | None
) -> Compiled | None:
    """The compiled form of elements beside others that follow flows. None where dropped packets have to be shown.

    first: those that judge do so before the others are asked.
    """
    if len(steps) > MOST or _drops_unseen(tuple(steps), tuple(steps.values()), own_lines):
        return None
    each_by_itself = any(step.changes or isinstance(step, Die) for step in steps.values())
    if each_by_itself and any(step.goes_by_flow for step in steps.values()):
        return None
    return Compiled(tuple(steps), FlowSteps(tuple(steps.values()) or (Step(),), monitor, table, first))
