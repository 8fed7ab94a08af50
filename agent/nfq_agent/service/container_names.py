"""What leads to one container, in memory that the supervisor shares with a queue's worker.

An interface does, and on a bridge that has no port of a packet's own the address of the container's end.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from struct import Struct
from typing import Final

_SIZE: Final = 1 << 20
# A number that is odd while the names are being written, and their length.
_HEAD: Final = Struct("=QQ")


@dataclass(frozen=True, slots=True)
class Behind:
    """Names of containers.

    links: by the index of the interface that leads to one. bridges: by the index of a bridge, and by the address (packed) of a
    container on it.
    """

    links: Mapping[int, str] = field(default_factory=dict)
    bridges: Mapping[int, Mapping[bytes, str]] = field(default_factory=dict)


class ContainerNames:
    """The names, in memory that is shared: one process writes, those that it forks read."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _SIZE)
        self._numbers = memoryview(self._memory).cast("Q")
        self._read = 0
        self._behind = Behind()

    def write(self, behind: Behind) -> None:
        """Replace the names. Raises ValueError if they do not fit into a megabyte."""
        bridges = {bridge: {each.hex(): name for each, name in by.items()} for bridge, by in behind.bridges.items()}
        data = json.dumps({"links": dict(behind.links), "bridges": bridges}).encode()
        if len(data) > _SIZE - _HEAD.size:
            raise ValueError(f"the names of {len(behind.links)} containers do not fit into {_SIZE} bytes")
        self._numbers[0] += 1
        self._numbers[1] = len(data)
        self._memory[_HEAD.size : _HEAD.size + len(data)] = data
        self._numbers[0] += 1

    def read(self) -> Behind:
        """The names; those of before while new ones are being written."""
        number = self._numbers[0]
        if number == self._read or number % 2:
            return self._behind
        data = bytes(self._memory[_HEAD.size : _HEAD.size + self._numbers[1]])
        if number == self._numbers[0]:
            said = json.loads(data)
            self._behind = Behind(
                {int(index): name for index, name in said["links"].items()},
                {int(bridge): {bytes.fromhex(at): name for at, name in by.items()} for bridge, by in said["bridges"].items()},
            )
            self._read = number
        return self._behind
