"""`reset-after`: the connection is reset after a time, whatever it does (toxiproxy's `reset_peer`)."""

from __future__ import annotations

from typing import Final, Literal

from nfq_agent import element
from nfq_agent.stream import CLOSE, Act, Answer, Connection, Part, StreamElement, Way
from nfq_agent.values import Duration

# A due time counts as reached despite rounding.
_SLACK: Final = 1e-6


class ResetAfterOptions(element.Options):
    """after: seconds from the beginning of the connection; 0 resets it before it is connected."""

    after: Duration = 0.0


class ResetAfter(StreamElement[ResetAfterOptions]):
    """Lets bytes pass until the time is over."""

    def opened(self, connection: Connection) -> Part | Literal[Act.CLOSE]:
        """Ask to be called again when the time is over."""
        return Part(b"", self.options.after) if self.options.after else CLOSE

    def request(self, data: bytes, connection: Connection) -> Answer:
        """Let it pass; the timer continues."""
        left = connection.opened + self.options.after - connection.now
        return Part(data, left) if left > _SLACK else CLOSE

    def response(self, data: bytes, connection: Connection) -> Answer:
        """It passes, too."""
        return self.request(data, connection)

    def rest(self, way: Way, connection: Connection) -> bytes | Literal[Act.CLOSE]:
        """CLOSE, when the time is over."""
        return CLOSE if connection.now >= connection.opened + self.options.after - _SLACK else b""
