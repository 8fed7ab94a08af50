"""The bytes of a connection's client that were read, to compare with what is sent again. No I/O, no clock.

A sender with raw sockets can send a segment that never arrives, and then another one with the same sequence numbers. Which
of them the server takes is not known. So what was read is kept until the server acknowledges it, and what is sent again
has to be the same.
"""

from __future__ import annotations

from typing import Final

# Bytes of a connection that are kept at most, the latest.
MOST: Final = 16384
_HALF: Final = 1 << 31


def distance(sequence: int, origin: int) -> int:
    """How far a sequence number lies behind another one; below 0 for before it (RFC 9293 3.4)."""
    offset = sequence - origin & 0xFFFFFFFF
    return offset - (1 << 32) if offset >= _HALF else offset


class ReadBytes:
    """Pieces of the client's bytes, in their order; between them lie bodies, which are not read. held: bytes kept now."""

    __slots__ = ("_floor", "_pieces", "held")

    def __init__(self) -> None:
        self._pieces: list[tuple[int, bytes]] = []
        # Where the latest piece begins that was dropped to make room; None if none was.
        self._floor: int | None = None
        self.held = 0

    def add(self, sequence: int, data: bytes) -> None:
        """Keep bytes that lie behind all that are kept. sequence: of the first one."""
        self._pieces.append((sequence, data))
        self.held += len(data)
        while self.held > MOST and len(self._pieces) > 1:
            first, dropped = self._pieces.pop(0)
            self.held -= len(dropped)
            self._floor = first + len(dropped) & 0xFFFFFFFF

    @property
    def ends(self) -> tuple[int, int]:
        """The numbers behind the first and the last piece that is kept."""
        (first, piece), (last, latest) = self._pieces[0], self._pieces[-1]
        return first + len(piece) & 0xFFFFFFFF, last + len(latest) & 0xFFFFFFFF

    def differs(self, sequence: int, data: bytes) -> bool:
        """Whether these bytes differ from those that are kept with the same numbers."""
        for first, piece in self._pieces:
            offset = distance(sequence, first)
            if offset >= 0:
                both = min(len(piece) - offset, len(data))
                if both > 0 and piece[offset : offset + both] != data[:both]:
                    return True
            else:
                both = min(len(data) + offset, len(piece))
                if both > 0 and data[-offset : both - offset] != piece[:both]:
                    return True
        return False

    def lost(self, sequence: int) -> bool:
        """Whether bytes from this number on were read and are not kept any more, without an acknowledgement."""
        return self._floor is not None and distance(sequence, self._floor) < 0

    def acknowledge(self, number: int) -> None:
        """The server has taken the bytes before this number, and takes no others in their place."""
        while self._pieces and distance(number, self._pieces[0][0] + len(self._pieces[0][1])) >= 0:
            self.held -= len(self._pieces.pop(0)[1])
        if self._floor is not None and distance(number, self._floor) >= 0:
            self._floor = None
