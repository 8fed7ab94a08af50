"""The facts of a flow as `dpi` keeps them: message by message. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from nfq_agent.element import Emit
from nfq_agent.facts import fields, words
from nfq_agent.flow import Flow
from nfq_agent.packet import TCP
from nfq_agent.protocols import dot
from nfq_agent.protocols.known import OWNERS

# The facts of a message; those that elements of others keep stay.
_MESSAGE_FACTS: Final = frozenset((*OWNERS, "conflict", "dpi_reason", "encrypted"))


class FlowFacts:
    """Puts what is read of messages into the facts of their flows.

    name: of the element. emit: takes its events. log: say what each flow is, once it is decided or given up.
    """

    def __init__(self, name: str, emit: Emit, log: bool) -> None:
        self._name = name
        self._emit = emit
        self._log = log

    def next_message(self, flow: Flow, first: bool) -> None:
        """From now on the facts are those of another message. first: of those that the packet at hand brings."""
        if not first:
            flow.earlier += (dict(flow.facts),)
        flow.message += 1
        _clear(flow)

    def forget_message(self, flow: Flow) -> None:
        """Another message has begun, and perhaps of another protocol."""
        flow.message += 1
        _clear(flow)
        flow.facts.pop("protocol", None)

    def part(self, flow: Flow, facts: Mapping[str, Any]) -> None:
        """The message is not complete; these facts are known of it."""
        _add(flow, facts)
        flow.facts["dpi"] = "undecided"
        flow.undecided = True

    def whole(self, flow: Flow, facts: Mapping[str, Any], new: bool = True) -> None:
        """The message is complete. new: it says something else than the one before."""
        _add(flow, facts)
        if conflict := facts.get("conflict"):
            self._emit(f"{self._name}: {flow.origin}: conflict: {conflict}", level="warning")
        flow.facts["dpi"] = "decided"
        flow.undecided = False
        if self._log and new:
            self._say(flow)

    def give_up(self, flow: Flow, reason: str, conflict: bool = False) -> None:
        """The message cannot be read. conflict: it has a name that is not known."""
        facts = flow.facts
        facts["dpi"] = "gave-up"
        facts["dpi_reason"] = reason
        flow.undecided = False
        if conflict:
            facts["conflict"] = reason
            self._emit(f"{self._name}: {flow.origin}: conflict: {reason}", level="warning")
        if self._log:
            self._say(flow)

    def _say(self, flow: Flow) -> None:
        """One line: what the flow is and the name that it asks for; all facts as fields."""
        what = words(flow.facts) or f"not identified: {flow.facts.get('dpi_reason')}"
        self._emit(f"{flow.origin}: {what}", **fields(flow.facts))


def _add(flow: Flow, facts: Mapping[str, Any]) -> None:
    """Put facts of a message into the flow, and what they mean together with the server's port."""
    flow.facts |= facts
    origin = flow.origin
    if origin.protocol == TCP:
        flow.facts |= dot.facts(facts, origin.dport if flow.origin_is_client else origin.sport)


def _clear(flow: Flow) -> None:
    """Drop the facts of a message; the protocol stays."""
    facts = flow.facts
    for name in _MESSAGE_FACTS.intersection(facts):
        del facts[name]
