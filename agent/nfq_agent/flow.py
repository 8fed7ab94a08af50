"""Flows: both directions of one conversation, in a table that is bounded and forgets the oldest first. Reads no clock."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Final

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
    answered: both sides were seen. midstream: its beginning was not seen, nor is it known what it has said.
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
    answered: bool = False
    midstream: bool = False


# A flow that was not answered and sent fewer packets than this is half open, as all flows of a flood from spoofed addresses are.
_SETTLED: Final = 3


class FlowTable:
    """At most `limit` flows; one that saw no packet for `max_idle` seconds is forgotten, and the longest idle when it is full.

    Half-open flows are forgotten first. In a full table an eighth is theirs: a flood of them makes room among itself.
    """

    def __init__(self, limit: int = 65536, max_idle: float = 300.0) -> None:
        if limit < 1:
            raise ValueError("a flow table holds at least one flow")
        self._limit = limit
        self._max_idle = max_idle
        self._share = max(1, limit // 8)
        # Both in the order of the last packet, so that ageing looks at the head only.
        self._settled: OrderedDict[FiveTuple, Flow] = OrderedDict()
        self._half_open: OrderedDict[FiveTuple, Flow] = OrderedDict()
        self.evicted = 0

    def __len__(self) -> int:
        return len(self._settled) + len(self._half_open)

    def find(self, five_tuple: FiveTuple) -> Flow | None:
        """The flow that a packet with this five-tuple would belong to, if there is one."""
        back = five_tuple.reversed()
        flows = (flows.get(key) for flows in (self._settled, self._half_open) for key in (five_tuple, back))
        return next((flow for flow in flows if flow is not None), None)

    def observe(self, five_tuple: FiveTuple, now: float) -> Flow:
        """The flow that a packet with this five-tuple belongs to, made if it is new, and counted."""
        key = five_tuple
        flow = self._settled.get(key)
        if flow is None:
            key = five_tuple.reversed()
            flow = self._settled.get(key)
        if flow is None:
            return self._observe_half_open(five_tuple, key, now)
        self._settled.move_to_end(key)
        flow.answered = flow.answered or five_tuple != flow.origin
        flow.last = now
        flow.packets += 1
        return flow

    def _observe_half_open(self, five_tuple: FiveTuple, back: FiveTuple, now: float) -> Flow:
        flow = self._half_open.get(five_tuple)
        key = five_tuple
        if flow is None:
            key = back
            flow = self._half_open.get(key)
        if flow is None:
            flow = self._half_open[five_tuple] = Flow(five_tuple, now, now, packets=1)
            self._make_room(now)
            return flow
        flow.answered = flow.answered or key is back
        flow.last = now
        flow.packets += 1
        if flow.answered or flow.packets >= _SETTLED:
            del self._half_open[key]
            # Not the packet's own five-tuple, which would be kept beside the flow's.
            self._settled[flow.origin if key == flow.origin else key] = flow
            if not self._half_open:
                # A dictionary keeps the room that it once needed.
                self._half_open.clear()
        else:
            self._half_open.move_to_end(key)
        return flow

    def _make_room(self, now: float) -> None:
        # Two a turn: ageing keeps up with any rate of new flows and never stops the loop for long.
        for _ in range(2):
            full = len(self) > self._limit
            if self._half_open and ((full and len(self._half_open) > self._share) or self._is_old(self._half_open, now)):
                self._half_open.popitem(last=False)
            elif self._settled and (full or self._is_old(self._settled, now)):
                self._settled.popitem(last=False)
            else:
                return
            self.evicted += 1

    def _is_old(self, flows: OrderedDict[FiveTuple, Flow], now: float) -> bool:
        return now - next(iter(flows.values())).last > self._max_idle
