"""Decided connections in memory that outlives the worker which decided them: whose they are, and what they said.

A worker that begins, or a flow table that has forgotten a connection, finds here what the connection's messages said, and judges
it by that. What is kept are facts and no verdicts, so that a changed policy holds for what it finds. No I/O: the memory is given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from struct import Struct
from typing import Any, Final

from nfq_agent.packet import FiveTuple

# Connections of one queue at most, and bytes of each. A connection is looked for in one row of WAYS places.
PLACES: Final = 32768
RECORD: Final = 384
WAYS: Final = 8
_ROWS: Final = PLACES // WAYS
_MAGIC: Final = b"nfqflow2"
_HEAD: Final = 64
_TAGS: Final = _HEAD
_STAMPS: Final = _TAGS + 4 * PLACES
_RECORDS: Final = _STAMPS + 4 * PLACES
SIZE: Final = _RECORDS + RECORD * PLACES
_ROW: Final = Struct(f"<{WAYS}I")
_ONE: Final = Struct("<I")
_SEEDS: Final = Struct("<QQ")
# protocol, whether it is IPv6, the lower end's address, the other's, the ports: the key of the flow table
_ENDS: Final = Struct("!BBxx16s16sHH")
_WORDS: Final = Struct("<5Q")
_64_BITS: Final = 0xFFFFFFFFFFFFFFFF
# length of the facts, protocol, length of an address, source, destination
_KEY: Final = Struct("!HBB16sH16sH")
# A connection of which only one direction was ever seen counts as this many seconds older: it makes room first.
_UNANSWERED: Final = 3600
# Stamps begin here, so that one that was made older is not a negative number.
_BEGIN: Final = 1 << 20


class FlowMemory:
    """At most PLACES connections; the one that was decided longest ago makes room, those never answered before others.

    room: the memory, which nfq_agent.openings writes as well. era: tells this object, and its copies in other processes, from
    those that were made of the same memory before.

    One process writes. A record is invisible while it is written, so that a process that is killed leaves none in part.
    """

    def __init__(self, memory: memoryview, seed: bytes) -> None:
        """memory: SIZE bytes, empty or as an earlier process left them. seed: 16 random bytes, taken if it is empty."""
        if len(memory) != SIZE:
            raise ValueError(f"{len(memory)} bytes; a flow memory has {SIZE}")
        self.room = memory
        self.era = seed.hex()
        if bytes(memory[:8]) != _MAGIC:
            memory[_TAGS:_STAMPS] = bytes(_STAMPS - _TAGS)
            memory[8:24] = seed
            memory[:8] = _MAGIC
        self._seeds = _SEEDS.unpack(memory[8:24])

    def keep(self, origin: FiveTuple, facts: Mapping[str, Any], answered: bool, now: float) -> None:
        """Keep what a connection said. origin: as the flow has it. now: seconds of the monotonic clock."""
        text = text_of(facts)
        row, tag = self._row(origin)
        place = self._find(row, tag, origin)
        if place is None:
            tags = _ROW.unpack_from(self.room, _TAGS + 4 * row)
            stamps = _ROW.unpack_from(self.room, _STAMPS + 4 * row)
            place = row + (tags.index(0) if 0 in tags else stamps.index(min(stamps)))
        at = _RECORDS + RECORD * place
        _ONE.pack_into(self.room, _TAGS + 4 * place, 0)
        protocol, src, sport, dst, dport = origin
        _KEY.pack_into(self.room, at, len(text), protocol, len(src), src, sport or 0, dst, dport or 0)
        self.room[at + _KEY.size : at + _KEY.size + len(text)] = text
        _ONE.pack_into(self.room, _STAMPS + 4 * place, int(now) + _BEGIN - (0 if answered else _UNANSWERED))
        _ONE.pack_into(self.room, _TAGS + 4 * place, tag)

    def recall(self, five_tuple: FiveTuple) -> tuple[FiveTuple, dict[str, Any]] | None:
        """The origin and the facts of the connection that a packet belongs to, or None."""
        row, tag = self._row(five_tuple)
        place = self._find(row, tag, five_tuple)
        if place is None:
            return None
        at = _RECORDS + RECORD * place
        length = int.from_bytes(self.room[at : at + 2], "big")
        try:
            found = json.loads(bytes(self.room[at + _KEY.size : at + _KEY.size + length]))
        except ValueError:
            return None
        facts = {str(name): tuple(value) if isinstance(value, list) else value for name, value in found.items()}
        return self._origin(place), facts

    def forget(self, five_tuple: FiveTuple) -> None:
        """Another connection begins on these ends."""
        row, tag = self._row(five_tuple)
        if (place := self._find(row, tag, five_tuple)) is not None:
            _ONE.pack_into(self.room, _TAGS + 4 * place, 0)

    def _row(self, five_tuple: FiveTuple) -> tuple[int, int]:
        """The first place of the row, and the tag: the same for both directions."""
        protocol, src, sport, dst, dport = five_tuple
        if (src, sport or 0) > (dst, dport or 0):
            src, sport, dst, dport = dst, dport, src, sport
        # As nfq_agent.flow_record: each word is multiplied by a secret, and both halves of the product are joined.
        mixed, secret = self._seeds
        for word in _WORDS.unpack(_ENDS.pack(protocol, len(src) == 16, src, dst, sport or 0, dport or 0)):
            product = (mixed ^ word) * (secret | 1)
            mixed = product & _64_BITS ^ product >> 64
        return (mixed & 0xFFFFFFFF) % _ROWS * WAYS, mixed >> 32 or 1

    def _find(self, row: int, tag: int, five_tuple: FiveTuple) -> int | None:
        tags = _ROW.unpack_from(self.room, _TAGS + 4 * row)
        if tag not in tags:
            return None
        place = row + tags.index(tag)
        return place if self._origin(place) in (five_tuple, five_tuple.reversed()) else None

    def _origin(self, place: int) -> FiveTuple:
        _, protocol, size, src, sport, dst, dport = _KEY.unpack_from(self.room, _RECORDS + RECORD * place)
        return FiveTuple(protocol, src[:size], sport, dst[:size], dport)


def text_of(facts: Mapping[str, Any]) -> bytes:
    """The facts as they are kept: without the longest ones, where they need more room than there is."""
    kept = dict(facts)
    while len(text := json.dumps(kept, separators=(",", ":")).encode()) > RECORD - _KEY.size:
        longest = max((name for name in kept if name != "dpi"), key=lambda name: len(str(kept[name])))
        del kept[longest]
    return text
