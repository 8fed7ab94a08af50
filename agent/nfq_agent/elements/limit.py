"""`limit`: at most a number of bytes a second, on average."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field

from nfq_agent import element
from nfq_agent.element import Emit
from nfq_agent.stream import Answer, Connection, Later, StreamElement, Way, Ways, ways_of

# Smaller pieces cost more than they gain in smoothness.
_LEAST: Final = 512


class LimitOptions(element.Options):
    """bytes_per_second: in each direction. burst: bytes that may pass at once before that. way: the direction. per: each
    connection has its own share, or all connections of one proxy process have one together.
    """

    bytes_per_second: Annotated[int, Field(ge=1)]
    burst: Annotated[int, Field(ge=0)] = 0
    way: Ways = "both"
    per: Literal["connection", "proxy"] = "connection"


class Limit(StreamElement[LimitOptions]):
    """Holds each chunk until its last byte is due. Back-pressure then slows the sender down."""

    def __init__(self, name: str, options: LimitOptions, emit: Emit) -> None:
        super().__init__(name, options, emit)
        self.asks = ways_of(options.way)
        # A chunk is held until its last byte is due: ten a second, so that a slow rate is not a burst every few seconds.
        self.most = max(_LEAST, options.bytes_per_second // 10)
        # When the rate allows the next bytes, by way.
        self._free: dict[Way, float] = {}

    def request(self, data: bytes, connection: Connection) -> Answer:
        """As soon as it is due."""
        return self._due(Way.REQUEST, len(data), connection)

    def response(self, data: bytes, connection: Connection) -> Answer:
        """As soon as it is due."""
        return self._due(Way.RESPONSE, len(data), connection)

    def _due(self, way: Way, length: int, connection: Connection) -> Answer:
        free: dict[Any, float]
        free = self._free if self.options.per == "proxy" else connection.state.setdefault(self, {})
        rate = self.options.bytes_per_second
        now = connection.now
        due = max(free.get(way, 0.0), now - self.options.burst / rate) + length / rate
        free[way] = due
        return Later(due - now) if due > now else None
