"""One direction of a TCP connection put together from its segments, up to a limit (RFC 9293 3.10.7.4). No I/O, no clock.

Segments may come late, twice, or overlap. If two differ in the same byte, the result depends on the receiver: that is
reported (`conflict`), never resolved.
"""

from __future__ import annotations

from bisect import insort


class Reassembly:
    """The bytes of one direction from `first` on.

    first: the sequence number of the first byte. limit: bytes kept at most, in order and waiting together.
    data: what has come without a gap. conflict: True once an overlap differed. full: True once a byte was beyond the limit.
    held: bytes kept now.
    """

    __slots__ = ("_first", "_limit", "_waiting", "conflict", "data", "full", "held")

    def __init__(self, first: int, limit: int = 16384) -> None:
        self._first = first
        self._limit = limit
        self._waiting: list[tuple[int, bytes]] = []
        self.data = b""
        self.conflict = False
        self.full = False
        self.held = 0

    def add(self, sequence: int, segment: bytes) -> bool:
        """Take one segment. True if `data` grew."""
        offset = sequence - self._first & 0xFFFFFFFF
        if offset >= 1 << 31:
            # Before the beginning: a keep-alive probe, or a repeated SYN's place.
            offset -= 1 << 32
            segment = segment[-offset:]
            offset = 0
        if offset + len(segment) > self._limit:
            self.full = True
            segment = segment[: max(0, self._limit - offset)]
        if not segment:
            return False
        if offset > len(self.data):
            if self.held + len(segment) > self._limit:
                self.full = True
                segment = segment[: max(0, self._limit - self.held)]
            if segment:
                insort(self._waiting, (offset, segment))
                self.held += len(segment)
            return False
        before = len(self.data)
        self._join(offset, segment)
        self.held += len(self.data) - before
        self._take_waiting()
        return len(self.data) > before

    def forget(self, count: int) -> None:
        """Begin `count` bytes later; earlier bytes are dropped, received or not."""
        self._first = self._first + count & 0xFFFFFFFF
        self.data = self.data[count:]
        waiting = [(offset - count, segment) for offset, segment in self._waiting]
        self._waiting = [(max(0, offset), segment[max(0, -offset) :]) for offset, segment in waiting if offset + len(segment) > 0]
        self.full = False
        self._take_waiting()
        self.held = len(self.data) + sum(len(segment) for _, segment in self._waiting)

    def _take_waiting(self) -> None:
        while self._waiting and self._waiting[0][0] <= len(self.data):
            offset, segment = self._waiting.pop(0)
            self.held -= len(segment)
            size = len(self.data)
            self._join(offset, segment)
            self.held += len(self.data) - size

    def _join(self, offset: int, segment: bytes) -> None:
        known = self.data[offset : offset + len(segment)]
        if known and not segment.startswith(known):
            self.conflict = True
        self.data += segment[len(known) :]
