"""`timeout`: bytes are discarded, and the connection ends after a time (toxiproxy's `timeout`)."""

from __future__ import annotations

from typing import Final, Literal

from nfq_agent import element
from nfq_agent.element import Emit
from nfq_agent.stream import CLOSE, DROP, Act, Answer, Connection, Later, Part, StreamElement, Way, Ways, ways_of
from nfq_agent.values import Duration

# A due time counts as reached despite rounding.
_SLACK: Final = 1e-6


class TimeoutOptions(element.Options):
    """after: when the connection is reset, from its beginning; 0 for never. way: whose bytes are lost."""

    after: Duration = 0.0
    way: Ways = "both"


class Timeout(StreamElement[TimeoutOptions]):
    """Discards every byte."""

    def __init__(self, name: str, options: TimeoutOptions, emit: Emit) -> None:
        super().__init__(name, options, emit)
        self.asks = ways_of(options.way)

    def opened(self, connection: Connection) -> Part | None:
        """Ask to be called again when the time is over."""
        return Part(b"", self.options.after) if self.options.after else None

    def request(self, data: bytes, connection: Connection) -> Answer:
        """Lost."""
        return Part(b"", self._left(connection)) if self.options.after else DROP

    def response(self, data: bytes, connection: Connection) -> Answer:
        """Lost, too."""
        return self.request(data, connection)

    def rest(self, way: Way, connection: Connection) -> bytes | Later | Literal[Act.CLOSE]:
        """CLOSE when the time is over; the end of one half waits for that."""
        if not self.options.after:
            return b""
        left = self._left(connection)
        return Later(left) if left > _SLACK else CLOSE

    def _left(self, connection: Connection) -> float:
        return connection.opened + self.options.after - connection.now
