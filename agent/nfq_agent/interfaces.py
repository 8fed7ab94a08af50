"""The names of network interfaces by the indices that packets carry, remembered for some seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

_KEPT: Final = 5.0


class Interfaces:
    """Names by index. name_of: asks the kernel, as socket.if_indextoname does; raises OSError for an index that is gone."""

    def __init__(self, name_of: Callable[[int], str]) -> None:
        self._name_of = name_of
        self._names: dict[int, str] = {}
        self._until = 0.0

    def name(self, index: int, now: float) -> str:
        """The interface's name; `if-N` if it no longer exists, an empty string for 0. now: seconds, as packets have it."""
        if index == 0:
            return ""
        # An interface keeps its index when it is renamed, so names must expire.
        if not now <= self._until <= now + _KEPT:
            self._names.clear()
            self._until = now + _KEPT
        name = self._names.get(index)
        if name is None:
            try:
                name = self._name_of(index)
            except OSError:
                name = f"if-{index}"
            self._names[index] = name
        return name
