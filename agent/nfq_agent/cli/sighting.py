"""Where a recorded packet was seen, who sent it, and what the agent did with it: the comment of element `pcap`. Values only."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final
from urllib.parse import unquote

from nfq_agent.capture.recording import Recorded
from nfq_agent.packet import INWARD, OUTWARD, Hook

_COMMENT: Final = re.compile(
    r"(PREROUTING|INPUT|FORWARD|OUTPUT|POSTROUTING) ([a-z-]+)(?: in (\S+))?(?: out (\S+))?(?: to \d+)?((?: [a-z_]+ \S+)*)"
)
# What a comment says besides: numbers of the packet, by how they are written, and the owner of its flow.
_NUMBERS: Final = {"uid": 10, "gid": 10, "mark": 16}
_LARGEST: Final = 0xFFFFFFFF
# In which order the hooks of a rule are tried where the capture does not say where a packet was seen.
HOOKS: Final = (Hook.OUTPUT, Hook.INPUT, Hook.FORWARD, Hook.PREROUTING, Hook.POSTROUTING)


class Fate(IntEnum):
    """What happened to a packet or a flow; of a flow the greatest among those of its packets."""

    PASSED = 0
    WOULD_DROP = 1
    DROPPED = 2

    @property
    def word(self) -> str:
        """As people read it."""
        return {0: "accept", 1: "would drop", 2: "drop"}[self]


# By the word in a comment; any other is of a packet that passed.
_RECORDED: Final = {"drop": Fate.DROPPED, "reject": Fate.DROPPED, "would-drop": Fate.WOULD_DROP}


@dataclass(frozen=True, slots=True)
class Sighting:
    """Where a packet was seen, and what the agent did with it, as the comment of element `pcap` says.

    hook, outcome: None where the capture names the interface alone: then it is `inward` and `outward`. owner: of its flow, by
    the names of conditions.
    """

    hook: Hook | None
    outcome: Fate | None
    inward: str = ""
    outward: str = ""
    uid: int | None = None
    gid: int | None = None
    mark: int = 0
    owner: tuple[tuple[str, str], ...] = ()

    @property
    def told(self) -> set[str]:
        """The conditions that can hold, since it says what they ask for."""
        found = {key for key, _ in self.owner}
        if self.inward or self.outward:
            found.add("interface")
        if self.uid is not None:
            found |= {"uid", "owner"}
        if self.gid is not None:
            found.add("gid")
        return found

    @property
    def places(self) -> Iterator[tuple[Hook, str, str]]:
        """The hooks in which it may have been seen, with the interfaces by which it came in and goes out there."""
        if self.hook is not None:
            yield self.hook, self.inward, self.outward
            return
        for hook in HOOKS:
            if hook not in OUTWARD:
                yield hook, self.inward, ""
            if hook not in INWARD:
                yield hook, "", self.outward


def sighting(recorded: Recorded) -> Sighting | None:
    """What the capture says of where a packet was seen; None where that is nothing."""
    match = _COMMENT.fullmatch(recorded.comment)
    if match is not None:
        said = match[5].split()
        return Sighting(
            Hook[match[1]], _RECORDED.get(match[2], Fate.PASSED), match[3] or "", match[4] or "", **_owner(said[::2], said[1::2])
        )
    return Sighting(None, None, recorded.interface, recorded.interface) if recorded.interface else None


def _owner(keys: list[str], values: list[str]) -> dict[str, Any]:
    """The end of a comment as values of a sighting. Numbers that are none are left out: a capture may come from anywhere."""
    said = dict(zip(keys, values, strict=True))
    found: dict[str, Any] = {}
    for key, base in _NUMBERS.items():
        with contextlib.suppress(ValueError):
            if 0 <= (number := int(said.pop(key, ""), base)) <= _LARGEST:
                found[key] = number
    return {**found, "owner": tuple((key, unquote(value)) for key, value in said.items())}
