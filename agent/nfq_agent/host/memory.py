"""Memory behind a descriptor (memfd_create(2)): it exists as long as any process holds the descriptor."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from struct import Struct
from typing import Any, Final
from zlib import crc32

_PAGE: Final = 4096
# Of a note: its number, its length, and its check sum.
_HEAD: Final = Struct("=QII")
_PLACE: Final = 1 << 20


class SharedNumbers:
    """Room for 512 numbers, which a worker writes and its supervisors read."""

    def __init__(self, descriptor: int | None = None) -> None:
        """descriptor: of such memory, which this object takes over. Raises OSError, or ValueError for any other descriptor."""
        self._descriptor = _made(_PAGE) if descriptor is None else descriptor
        self.numbers = memoryview(mmap.mmap(self._descriptor, _PAGE))
        """The numbers, as bytes."""

    def fileno(self) -> int:
        """The descriptor that keeps the memory."""
        return self._descriptor


class Note:
    """A JSON object that another process reads when this one has ended, whenever it was killed.

    It is not mapped: a child that closes the descriptor has no way to it. There are two places, written in turn.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        """descriptor: of such a note, which this object takes over. Raises OSError."""
        self._descriptor = _made(2 * _PLACE) if descriptor is None else descriptor

    def fileno(self) -> int:
        """The descriptor that keeps it."""
        return self._descriptor

    def read(self) -> dict[str, Any]:
        """What was written last; empty if nothing was."""
        return self._latest()[1]

    def write(self, value: Mapping[str, Any]) -> None:
        """Replace it. Raises OSError if it does not fit."""
        data = json.dumps(value).encode()
        if len(data) > _PLACE - _HEAD.size:
            raise OSError(f"a note of {len(data)} bytes does not fit")
        number = self._latest()[0] + 1
        os.pwrite(self._descriptor, _HEAD.pack(number, len(data), crc32(data)) + data, number % 2 * _PLACE)

    def _latest(self) -> tuple[int, dict[str, Any]]:
        latest: tuple[int, dict[str, Any]] = (0, {})
        for place in (0, _PLACE):
            head = os.pread(self._descriptor, _HEAD.size, place)
            if len(head) == _HEAD.size:
                number, length, check = _HEAD.unpack(head)
                data = os.pread(self._descriptor, length, place + _HEAD.size)
                if number > latest[0] and crc32(data) == check:
                    latest = number, json.loads(data)
        return latest


def _made(size: int) -> int:
    descriptor = os.memfd_create("nfq-agent", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, size)
    return descriptor
