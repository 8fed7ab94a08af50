"""The flows whose bytes `dpi` keeps: how many, and for how long. No I/O, no clock."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from nfq_agent.conversation import Conversation
from nfq_agent.datagrams import Datagrams
from nfq_agent.flow import Flow
from nfq_agent.message_events import SECONDS


class KeptFlows:
    """At most `limit` flows of each kind; the oldest is given up first.

    open: those whose message is not complete, in the order in which they began, so that ageing looks at the head only. compared:
    those whose bytes were read and are kept to compare, the oldest first. give_up: takes a flow, the reason, and whether that is
    a conflict.
    """

    def __init__(self, limit: int, give_up: Callable[[Flow, str, bool], None]) -> None:
        self._limit = limit
        self._give_up = give_up
        self.open: OrderedDict[int, tuple[Flow, Conversation | Datagrams, float]] = OrderedDict()
        self.compared: OrderedDict[int, tuple[Flow, Conversation]] = OrderedDict()

    def drop(self, flow: Flow) -> None:
        """A new connection begins on the flow."""
        self.open.pop(id(flow), None)
        self.compared.pop(id(flow), None)

    def keep_or_not(self, flow: Flow, state: Conversation | Datagrams, began: float | None = None) -> None:
        """Bound the flows whose bytes are kept until their message is complete. began: when, in seconds; None for now."""
        keeps = state.keeps
        if not keeps and not self.open:
            return
        known = id(flow) in self.open
        if keeps == known:
            return
        if known:
            del self.open[id(flow)]
            return
        if len(self.open) >= self._limit:
            _, (oldest, other, _) = next(iter(self.open.items()))
            self._stop(oldest, other, "too many flows at a time were undecided")
        self.open[id(flow)] = flow, state, flow.last if began is None else began

    def compare_or_not(self, flow: Flow, connection: Conversation) -> None:
        """Bound the connections whose bytes are kept after they were read."""
        if not connection.compares:
            self.compared.pop(id(flow), None)
        elif id(flow) not in self.compared:
            if len(self.compared) >= self._limit:
                _, (_, oldest) = self.compared.popitem(last=False)
                oldest.compare_no_more()
            self.compared[id(flow)] = flow, connection

    def age(self, flow: Flow) -> None:
        """Give up what waits too long. flow: of the packet at hand, with its time."""
        now = flow.last
        # The packet's own flow, whatever others wait: its state must not depend on how many packets of others came.
        if (own := self.open.get(id(flow))) is not None and now - own[2] > SECONDS:
            self._stop(flow, own[1], f"{SECONDS:.0f} seconds have passed")
        # Two a turn, as in the flow table.
        for _ in range(2):
            if not self.open:
                return
            other, state, began = next(iter(self.open.values()))
            if now - began <= SECONDS:
                return
            self._stop(other, state, f"{SECONDS:.0f} seconds have passed")

    def _stop(self, flow: Flow, state: Conversation | Datagrams, reason: str) -> None:
        """Drop the kept bytes of a flow. A message that is not complete is given up; a decided flow stays decided."""
        del self.open[id(flow)]
        if not state.unfinished:
            state.forget()
            return
        for _, _, said, conflict in state.run_out(reason):
            self._give_up(flow, said, conflict)
