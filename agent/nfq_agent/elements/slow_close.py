"""`slow-close`: the end of a half arrives later than its last byte (toxiproxy's `slow_close`)."""

from __future__ import annotations

from nfq_agent import element
from nfq_agent.element import Emit
from nfq_agent.stream import Answer, Connection, Later, StreamElement, Way, Ways, ways_of
from nfq_agent.values import Duration


class SlowCloseOptions(element.Options):
    """by: how much later. way: the direction."""

    by: Duration
    way: Ways = "both"


class SlowClose(StreamElement[SlowCloseOptions]):
    """Delays the end, and no byte."""

    def __init__(self, name: str, options: SlowCloseOptions, emit: Emit) -> None:
        super().__init__(name, options, emit)
        self.asks = ways_of(options.way)

    def request(self, data: bytes, connection: Connection) -> Answer:
        """At once."""
        return None

    def response(self, data: bytes, connection: Connection) -> Answer:
        """At once."""
        return None

    def rest(self, way: Way, connection: Connection) -> Later:
        """The end waits."""
        return Later(self.options.by, b"")
