"""Descriptors for the next agent process, by name: those that the previous process left, and those that this one keeps.

Names: `queue-N`, `worker-N` and `counters-N` of a queue number (`coming-N` while its process is replaced, see stored_control),
`known-N` of one for known flows, `table` of the owned rules, `state` of the agent, `listener-P-I`, `proxy-P` and `tally-P` of a
proxy, `leaving-P-PID` and `tallied-P-PID` of its processes that finish their connections. Under systemd they are in its
descriptor store, which outlives this process; else they are handed down when this process starts again.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from typing import Any, Final, Protocol

from nfq_agent.host.memory import Note

_STATE: Final = "state"


class Keeper(Protocol):
    """What keeps descriptors while no agent runs (host/systemd.py)."""

    def keep(self, name: str, descriptor: int, polled: bool) -> None:
        """Keep a copy. polled: until its other end is closed. Raises OSError."""

    def forget(self, name: str) -> None:
        """Close every copy of this name. Raises OSError."""


class Store:
    """The descriptors by name, and what is noted beside them. Descriptors that are put in stay the caller's."""

    def __init__(self, handed: Mapping[str, int] | None = None, keeper: Keeper | None = None) -> None:
        """handed: what the previous process left to this one. keeper: None where descriptors end with this process."""
        self._handed = dict(handed or {})
        self._kept: dict[str, int] = {}
        self._keeper = keeper
        state = self.take(_STATE)
        self._note = Note(state)
        self._noted = self._note.read()

    @property
    def outlives(self) -> bool:
        """Whether the descriptors, and so the workers, outlive this process."""
        return self._keeper is not None

    @property
    def inherited(self) -> bool:
        """Whether something that the previous process handed over is not taken yet."""
        return bool(self._handed)

    @property
    def descriptors(self) -> list[int]:
        """The notes, and what is not taken: no child may keep them."""
        return [self._note.fileno(), *self._handed.values()]

    def noted(self, name: str) -> dict[str, Any]:
        """What was noted under this name; empty if nothing was."""
        found = self._noted.get(name)
        return found if isinstance(found, dict) else {}

    def note(self, name: str, value: Mapping[str, Any] | None) -> None:
        """Note this for the next process in place of what the name had; None for nothing. Raises OSError."""
        if self._noted.get(name) != value:
            self._noted.pop(name, None)
            if value is not None:
                # As it is read again: without tuples.
                self._noted[name] = json.loads(json.dumps(value))
            self._note.write(self._noted)
        self.put(_STATE, self._note.fileno())

    @property
    def kept(self) -> dict[str, int]:
        """What the next process gets."""
        return dict(self._kept)

    def waiting(self, prefix: str) -> list[str]:
        """The names with this beginning that the previous process handed over and that are not taken yet."""
        return sorted(name for name in self._handed if name.startswith(prefix))

    def take(self, name: str) -> int | None:
        """The descriptor that the previous process left, now the caller's, and kept for the next; None if there is none."""
        descriptor = self._handed.pop(name, None)
        if descriptor is not None:
            self._kept[name] = descriptor
        return descriptor

    def put(self, name: str, descriptor: int, polled: bool = False) -> None:
        """Keep it for the next process, in place of what had the name. polled: until its other end is closed. Raises OSError."""
        if self._kept.get(name) == descriptor:
            return
        self.drop(name)
        self._kept[name] = descriptor
        if self._keeper is not None:
            self._keeper.keep(name, descriptor, polled)

    def drop(self, name: str) -> None:
        """Stop keeping it. Nothing happens if it is not kept. Raises OSError."""
        if self._kept.pop(name, None) is not None and self._keeper is not None:
            self._keeper.forget(name)

    def clear(self) -> None:
        """Keep nothing, and close what is not taken. Raises OSError."""
        for name, descriptor in self._handed.items():
            self._kept[name] = descriptor
            os.close(descriptor)
        self._handed.clear()
        for name in list(self._kept):
            self.drop(name)

    def discard(self, name: str) -> None:
        """Close what the previous process left under this name, and stop keeping it. Raises OSError."""
        if (descriptor := self.take(name)) is not None:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            self.drop(name)
