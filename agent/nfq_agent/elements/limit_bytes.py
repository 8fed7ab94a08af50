"""`limit-bytes`: a number of bytes pass, then the connection is reset (toxiproxy's `limit_data`)."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field

from nfq_agent import element
from nfq_agent.element import Emit
from nfq_agent.stream import CLOSE, Act, Answer, Connection, Part, StreamElement, Way, Ways, ways_of

# A reset discards what has not been sent yet: the last bytes get this long, in seconds.
_GRACE: Final = 0.05


class LimitBytesOptions(element.Options):
    """bytes: that may pass, counted separately for each direction. way: the direction that is counted."""

    bytes: Annotated[int, Field(ge=0)]
    way: Ways = "both"


class LimitBytes(StreamElement[LimitBytesOptions]):
    """Counts bytes, and ends the connection in the middle of them."""

    def __init__(self, name: str, options: LimitBytesOptions, emit: Emit) -> None:
        super().__init__(name, options, emit)
        self.asks = ways_of(options.way)

    def request(self, data: bytes, connection: Connection) -> Answer:
        """The part that the limit leaves."""
        return self._pass(data, Way.REQUEST, connection)

    def response(self, data: bytes, connection: Connection) -> Answer:
        """The part that the limit leaves."""
        return self._pass(data, Way.RESPONSE, connection)

    def rest(self, way: Way, connection: Connection) -> bytes | Literal[Act.CLOSE]:
        """CLOSE, if the limit is reached."""
        passed: dict[Way, int] = connection.state.get(self, {})
        return CLOSE if passed.get(way, 0) >= self.options.bytes else b""

    def _pass(self, data: bytes, way: Way, connection: Connection) -> Answer:
        passed: dict[Way, int] = connection.state.setdefault(self, {})
        left = self.options.bytes - passed.get(way, 0)
        if len(data) < left:
            passed[way] = passed.get(way, 0) + len(data)
            return None
        passed[way] = self.options.bytes
        if left <= 0:
            return CLOSE
        return Part(data[:left], _GRACE)
