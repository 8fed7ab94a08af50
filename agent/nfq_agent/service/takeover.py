"""Packets that a dead worker had read and not answered: its successor queues them again, or answers them, before its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from nfq_agent.counters import Counters
from nfq_agent.element import Emit
from nfq_agent.packet import Packet
from nfq_agent.service.order import NOTHING_LOST, Order
from nfq_agent.service.packet_source import Lane
from nfq_agent.verdict import REPEAT, Verdict

# The counters of each queue of a source: of the latest packet; those that count what was lost; and what was read, besides all.
_LaneCounters = tuple[str, tuple[str, ...], tuple[str, ...]]
_LANE_COUNTERS: Final[Sequence[_LaneCounters]] = (
    ("last_id", ("lost",), ()),
    ("known_last_id", ("lost", "known_lost"), ("known_received",)),
)


class Takeover:
    """The lost packets of one predecessor. order: up to which number packets may wait, and whether they are queued again.

    on_error: their verdict where they are not queued again.
    """

    def __init__(self, order: Order, on_error: Verdict, counters: Counters, emit: Emit) -> None:
        self.order = order
        self._on_error = on_error
        self._counters = counters
        self._emit = emit

    @property
    def due(self) -> bool:
        """Whether packets may wait that were not looked for yet."""
        return self.order.below is not None

    def account_for(self, lanes: Sequence[Lane], judge: Callable[[list[Packet]], None]) -> int:
        """Queue the lost packets again, or answer them. judge: answers packets that were read meanwhile; returns how many.

        Lost are all that are older than the first packet that is read here; if there is none, all that the kernel had numbered
        when this process was started.
        """
        order, self.order = self.order, NOTHING_LOST
        places = zip(lanes, (order.below, order.known), _LANE_COUNTERS, strict=False)
        return sum(
            self._account_for_lane(lane, below, order.requeue, names, judge) for lane, below, names in places if below is not None
        )

    def _account_for_lane(
        self, lane: Lane, below: int, requeue: bool, names: _LaneCounters, judge: Callable[[list[Packet]], None]
    ) -> int:
        counters = self._counters
        packets = lane.read(1)
        if not packets:
            # A packet gets its number just before it gets into the socket.
            time.sleep(0.001)
            packets = lane.read(1)
        last = packets[0].id - 1 if packets else below
        # A packet that is queued again passes our rule again: its count and the numbers of the packets rise alike.
        lane.answer_lost(last & 0xFFFFFFFF, REPEAT if requeue else self._on_error)
        last_id, lost_names, read_names = names
        lost = (last - getattr(counters, last_id)) & 0xFFFFFFFF
        # Numbers are compared by a difference of 32 bits with a sign: from half of their range on it is negative.
        if 0 < lost < 0x80000000:
            _add(counters, lost_names, lost)
            setattr(counters, last_id, last)
            became = "are queued again" if requeue else "got the verdict on_error"
            self._emit(
                f"queue {lane.number}: up to {lost} packets that the previous worker had read {became}",
                level="warning",
                lost=lost,
            )
        if packets:
            judge(packets)
            _add(counters, read_names, len(packets))
            setattr(counters, last_id, packets[-1].id)
        return len(packets)


def _add(counters: Counters, names: Sequence[str], number: int) -> None:
    for name in names:
        setattr(counters, name, getattr(counters, name) + number)
