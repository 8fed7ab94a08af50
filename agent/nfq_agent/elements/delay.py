"""`delay`: every chunk arrives later, as over a slow link. Order is kept."""

from __future__ import annotations

import random

from nfq_agent import element
from nfq_agent.element import Emit
from nfq_agent.stream import Answer, Connection, Later, StreamElement, Ways, ways_of
from nfq_agent.values import Duration


class DelayOptions(element.Options):
    """by: seconds that a chunk is held. jitter: at most this much more, at random. way: the direction; with both, a round trip is
    delayed twice.
    """

    by: Duration
    jitter: Duration = 0.0
    way: Ways = "both"


class Delay(StreamElement[DelayOptions]):
    """Holds each chunk for a time. The proxy's `buffer` limits the bytes that may wait, and so the rate."""

    def __init__(self, name: str, options: DelayOptions, emit: Emit) -> None:
        super().__init__(name, options, emit)
        self.asks = ways_of(options.way)

    def request(self, data: bytes, connection: Connection) -> Answer:
        """Later."""
        return Later(self.options.by + random.uniform(0.0, self.options.jitter))

    def response(self, data: bytes, connection: Connection) -> Answer:
        """Later, too."""
        return self.request(data, connection)
