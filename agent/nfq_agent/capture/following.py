"""Which interfaces are followed, while interfaces appear, are renamed and disappear; and the rows in which they are counted.

It decides; the worker that follows them opens the sockets.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from nfq_agent.capture.selection import CaptureSelection
from nfq_agent.host.links import Link

# Interfaces that can be followed at once, each with a row of counters.
ROWS: Final = 4096


@dataclass(frozen=True, slots=True)
class Followed:
    """An interface that is followed, and its row."""

    link: Link
    row: int


class Follower:
    """The interfaces of a selection, by index."""

    def __init__(self, selection: CaptureSelection, rows: int = ROWS) -> None:
        self._selection = selection
        # The row that was given back longest ago comes first: a reader may still write into a fresh one.
        self._rows = deque(range(rows))
        self.followed: dict[int, Followed] = {}
        self.without_room = 0
        """Interfaces that were chosen and not followed, since all rows were in use."""

    def change(self, link: Link, gone: bool) -> tuple[Followed | None, Followed | None]:
        """Process one change. Returns the interface to follow from now on, and the one to stop following."""
        known = self.followed.get(link.index)
        if gone or not self._selection.chooses(link.name):
            if known is not None:
                del self.followed[link.index]
                self._rows.append(known.row)
            return None, known
        if known is not None:
            self.followed[link.index] = Followed(link, known.row)
            return None, None
        if not self._rows:
            self.without_room += 1
            return None, None
        new = self.followed[link.index] = Followed(link, self._rows.popleft())
        return new, None

    def resume(self, links: Iterable[Link]) -> tuple[list[Followed], list[Followed]]:
        """The same for a whole listing, for when changes may have been missed."""
        links = list(links)
        present = {link.index for link in links}
        lost = [each.link for index, each in self.followed.items() if index not in present]
        changes = [self.change(link, gone=True) for link in lost] + [self.change(link, gone=False) for link in links]
        return [come for come, _ in changes if come is not None], [gone for _, gone in changes if gone is not None]


class Table:
    """Rows of counters of 64 bits, made before the fork: one process writes them, others read."""

    def __init__(self, columns: Sequence[str], rows: int = ROWS) -> None:
        self.columns = tuple(columns)
        self._memory = mmap.mmap(-1, 8 * len(self.columns) * rows)
        self._cells = memoryview(self._memory).cast("Q")
        self._place = {name: number for number, name in enumerate(self.columns)}

    def add(self, row: int, column: str, count: int) -> None:
        """Count."""
        self._cells[row * len(self.columns) + self._place[column]] += count

    def clear(self, row: int) -> None:
        """Reset to zero: another interface gets the row."""
        start = row * len(self.columns)
        for cell in range(start, start + len(self.columns)):
            self._cells[cell] = 0

    def read(self, row: int) -> dict[str, int]:
        """One row, by column."""
        start = row * len(self.columns)
        return dict(zip(self.columns, self._cells[start : start + len(self.columns)], strict=True))
