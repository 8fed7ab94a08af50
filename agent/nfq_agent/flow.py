"""Flows: both directions of one conversation, in a table that is bounded and forgets the oldest first. Reads no clock."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from nfq_agent.packet import FiveTuple


@dataclass(slots=True)
class Flow:
    """What is remembered of one conversation.

    origin: the five-tuple of the first packet seen. first, last: when its first and latest packets came, seconds on the
    clock that the caller uses. packets: how many, both ways. facts: what elements found out and share, by attribute name
    ("tls_sni"); "dpi" is "undecided", "decided" or "gave-up". state: what an element keeps for itself, by the element.
    undecided: True while an answer is for the packet alone, since something about the flow is not known yet.
    message: the number of the message that the facts are of. earlier: the facts of messages that the packet at hand brings
    besides, before that one. ahead: the packet at hand can't be judged before bytes that have not come yet.
    unsound: why the receiver of the packet at hand discards it, so that nothing of it was read; empty if it does not.
    """

    origin: FiveTuple
    first: float
    last: float
    packets: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    state: dict[object, Any] = field(default_factory=dict)
    undecided: bool = False
    message: int = 0
    earlier: tuple[dict[str, Any], ...] = ()
    ahead: bool = False
    unsound: str = ""


class FlowTable:
    """At most `limit` flows; one that saw no packet for `max_idle` seconds is forgotten, and the longest idle when it is full."""

    def __init__(self, limit: int = 65536, max_idle: float = 300.0) -> None:
        if limit < 1:
            raise ValueError("a flow table holds at least one flow")
        self._limit = limit
        self._max_idle = max_idle
        # In the order of the last packet, so that ageing looks at the head only.
        self._flows: OrderedDict[FiveTuple, Flow] = OrderedDict()
        self.evicted = 0

    def __len__(self) -> int:
        return len(self._flows)

    def observe(self, five_tuple: FiveTuple, now: float) -> Flow:
        """The flow that a packet with this five-tuple belongs to, made if it is new, and counted."""
        flow = self._flows.get(five_tuple)
        key = five_tuple
        if flow is None:
            key = five_tuple.reversed()
            flow = self._flows.get(key)
        if flow is None:
            key = five_tuple
            flow = self._flows[key] = Flow(five_tuple, now, now)
            self._make_room(now)
        else:
            self._flows.move_to_end(key)
        flow.last = now
        flow.packets += 1
        return flow

    def _make_room(self, now: float) -> None:
        # Two a turn: ageing keeps up with any rate of new flows and never stops the loop for long.
        for _ in range(2):
            key, oldest = next(iter(self._flows.items()))
            if now - oldest.last <= self._max_idle and len(self._flows) <= self._limit:
                return
            if len(self._flows) == 1:
                return
            del self._flows[key]
            self.evicted += 1
