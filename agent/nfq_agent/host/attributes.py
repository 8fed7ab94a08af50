"""Netlink attributes: a length, a type and a value, padded to four bytes (netlink(7), struct nlattr). No socket is used here."""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import Final

_HEADER: Final = Struct("=HH")
# The two highest bits of a type say that it is nested, or in network byte order.
_TYPE_MASK: Final = 0x3FFF


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    return _HEADER.pack(4 + len(value), kind) + value + bytes(-len(value) & 3)


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, value) of every attribute in `data`. Raises ValueError where it is cut off."""
    place, end = 0, len(data)
    while place + 4 <= end:
        size, kind = _HEADER.unpack_from(data, place)
        if size < 4 or place + size > end:
            raise ValueError("an attribute is cut off")
        yield kind & _TYPE_MASK, data[place + 4 : place + size]
        place += size + 3 & ~3
