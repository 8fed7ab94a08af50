"""The base of stream elements, and what one may answer. `nfq_agent.stream` exports all of it.

Elements see chunks, and must not rely on where one ends and the next begins.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, Generic, Literal, NamedTuple

from nfq_agent.access import HasAccess
from nfq_agent.connection import Connection, Way
from nfq_agent.element import Emit, HasOptions, O
from nfq_agent.verdict import Verdict


class Act(Enum):
    """An answer that is about the whole connection."""

    CLOSE = "close"


CLOSE: Final = Act.CLOSE


class Done(NamedTuple):
    """Pass `data` on (None: as it came), and do not ask this element again about this direction of this connection.

    A direction that no element looks at any more bypasses the stream.
    """

    data: bytes | None = None


class Later(NamedTuple):
    """Pass `data` on (None: as it came) after `seconds`. What comes after it waits behind it."""

    seconds: float
    data: bytes | None = None


class Part(NamedTuple):
    """Pass `data` on and keep the rest back. If no byte follows within `seconds`, the element is asked for its `rest`."""

    data: bytes
    seconds: float


# None and ACCEPT pass the chunk on as it is, bytes pass on in its place (empty ones: nothing yet), DROP passes nothing on.
# ACCEPT and DROP are the verdicts of packet elements, by the same names; a stream has no other verdicts.
Answer = bytes | Verdict | Act | Done | Later | Part | None

Ways = Literal["both", "request", "response"]


def ways_of(text: Ways) -> frozenset[Way]:
    """The ways that an option names."""
    return frozenset(Way) if text == "both" else frozenset((Way[text.upper()],))


class StreamElement(HasOptions, HasAccess, Generic[O]):
    """Base of every element that looks at streams. One object serves all connections of a process.

    The model of its table is the parameter of its base, as in `class MyElement(StreamElement[MyOptions])`, or its attribute
    `Options`. `asks` lists the directions in which it is asked: those whose method it overrides, unless it says otherwise
    itself. `emit(message, level="info", **fields)` emits one event and never blocks. `access`: see `PacketElement`.
    """

    # The most bytes that it sees at once; None for the proxy's `chunk`. An instance may set it.
    most: int | None = None
    # Whether each of its chunks is sent by itself. Else those that are due together are sent as one.
    apart: bool = False

    def __init__(self, name: str, options: O, emit: Emit) -> None:
        self.name = name
        self.options = options
        self.emit = emit
        kind = type(self)
        self.asks = frozenset(
            way
            for way, own, base in (
                (Way.REQUEST, kind.request, StreamElement.request),
                (Way.RESPONSE, kind.response, StreamElement.response),
            )
            if own is not base
        )

    def start(self) -> None:
        """Called once in the proxy's process, before the first connection."""

    def stop(self) -> None:
        """Called once in the proxy's process, after the last connection."""

    def opened(self, connection: Connection) -> Part | Literal[Act.CLOSE] | None:
        """Called for each new connection before it is connected. CLOSE refuses it; an empty Part asks for `rest` in time."""
        return None

    def request(self, data: bytes, connection: Connection) -> Answer:
        """The answer to bytes that the client sent."""
        return None

    def response(self, data: bytes, connection: Connection) -> Answer:
        """The answer to bytes that the destination sent."""
        return None

    def rest(self, way: Way, connection: Connection) -> bytes | Later | Literal[Act.CLOSE]:
        """The bytes of a way that it still holds back, and then holds no more: that way has ended, or a Part waited enough.

        Later holds them for a time, and the end behind them; CLOSE resets the connection.
        """
        return b""

    def closed(self, connection: Connection) -> None:
        """Called once for each connection that was opened, when it has ended."""
