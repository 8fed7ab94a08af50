"""`slicer`: bytes arrive in small pieces, one after the other (toxiproxy's `slicer`)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from nfq_agent import element
from nfq_agent.element import Emit
from nfq_agent.stream import Answer, Connection, Later, StreamElement, Way, Ways, ways_of
from nfq_agent.values import Duration


class SlicerOptions(element.Options):
    """size: the most bytes of a piece. delay: between two of them. way: the direction."""

    size: Annotated[int, Field(ge=1, le=1 << 20)] = 64
    delay: Annotated[Duration, Field(gt=0)] = 0.001
    way: Ways = "both"


class Slicer(StreamElement[SlicerOptions]):
    """Cuts, and changes no byte. Readers that mistake one piece for a whole message fail."""

    # Also where the proxy is late, and several are due.
    apart = True

    def __init__(self, name: str, options: SlicerOptions, emit: Emit) -> None:
        super().__init__(name, options, emit)
        self.asks = ways_of(options.way)
        self.most = options.size

    def request(self, data: bytes, connection: Connection) -> Answer:
        """A piece, after the one before it."""
        return self._next(Way.REQUEST, connection)

    def response(self, data: bytes, connection: Connection) -> Answer:
        """A piece, after the one before it."""
        return self._next(Way.RESPONSE, connection)

    def _next(self, way: Way, connection: Connection) -> Answer:
        # When the last piece is sent, by way.
        last: dict[Way, float] = connection.state.setdefault(self, {})
        due = last[way] = max(connection.now, last.get(way, 0.0) + self.options.delay)
        return Later(due - connection.now) if due > connection.now else None
