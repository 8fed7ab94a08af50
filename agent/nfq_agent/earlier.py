"""Earlier connections on a five-tuple, where no answer of a server to the latest SYN was seen. No I/O, no clock.

A sender with raw sockets can show only to the agent that a connection ends and another one begins. Until a server has
answered, an earlier connection may be the real one.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from nfq_agent.read_bytes import distance

# How far the client of the latest connection is followed, and how far ahead or behind it may be.
_FOLLOWED: Final = 65536
_WINDOW: Final = 1 << 20
# Earlier connections, one after the other.
_MOST: Final = 64


class Belongs(Enum):
    """Which connection a segment is of."""

    LATEST = "latest"
    EARLIER = "earlier"
    NONE = "none"


class Earlier:
    """Where the clients of earlier connections were.

    places: the first number of each that was read, or of the latest 64 KiB of it, and the number that would come next.
    initial: the initial sequence number of the latest connection's client.
    """

    __slots__ = ("_edge", "_initial", "places")

    def __init__(self, places: tuple[tuple[int, int], ...], initial: int) -> None:
        self.places = places
        self._initial = initial
        # Behind all that the client has sent on the latest connection.
        self._edge = initial + 1 & 0xFFFFFFFF

    def and_then(self, first: int, awaited: int, initial: int) -> Earlier:
        """The same, when another SYN begins: with the connection that was the latest. first: the number of its first byte."""
        if distance(awaited, first) > _FOLLOWED:
            first = awaited - _FOLLOWED & 0xFFFFFFFF
        return Earlier((*self.places, (first, awaited)), initial)

    @property
    def over(self) -> bool:
        """Whether the client has sent so much that an earlier number may occur by chance."""
        return distance(self._edge, self._initial) > _FOLLOWED

    def of(self, sequence: int, size: int) -> Belongs:
        """Which connection a segment of the client belongs to, by its number and length."""
        end = sequence + size
        here = any(distance(end, first) > 0 and distance(sequence, awaited) <= 0 for first, awaited in self.places)
        if here or len(self.places) > _MOST:
            return Belongs.EARLIER
        offset = distance(sequence, self._edge)
        if abs(offset) > _WINDOW:
            return Belongs.NONE
        self._edge = self._edge + max(0, offset + size) & 0xFFFFFFFF
        return Belongs.LATEST
