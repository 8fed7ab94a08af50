"""Which names DNS answers gave for an address, in memory that all workers of an instance share. No I/O: the memory is given.

The memory has a region for each worker that writes, so that none waits for another; all read all of it. A worker writes before it
lets the answer pass, so that no connection can come before its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from struct import Struct
from typing import Final

from nfq_agent.dns_answer import SERVICE, DnsAnswer
from nfq_agent.patterns import Patterns

REGIONS: Final = 8
# Names of addresses in a region, and bytes of each; what is looked for together is one row.
PLACES: Final = 4096
RECORD: Final = 160
WAYS: Final = 32
_ROWS: Final = PLACES // WAYS
_MAGIC: Final = b"nfqname1"
_OWNERS: Final = 32
_HEAD: Final = _OWNERS + 4 * REGIONS
_REGION: Final = (8 + RECORD) * PLACES
SIZE: Final = _HEAD + REGIONS * _REGION
_ROW: Final = Struct(f"<{WAYS}I")
_ONE: Final = Struct("<I")
# key: an address, or of an alias the digest of what it stands for; length of the name
_KEY: Final = Struct("!B16sB")
LONGEST: Final = RECORD - _KEY.size
_ALIAS: Final = 0
# Programs connect some time after the answer, and again later: a shorter time counts as this, a longer one as that. Seconds.
AT_LEAST: Final = 60
AT_MOST: Final = 86400
# Names that stand for each other in a row, at most.
_CHAIN: Final = 16


class NameTable:
    """The names that rules ask for, by the addresses that answers gave for them.

    believed: packed addresses of the resolvers whose answers count. A full row forgets what ends first.
    """

    def __init__(self, memory: memoryview, seed: bytes, writer: int, wanted: Iterable[str], believed: Iterable[bytes]) -> None:
        """memory: SIZE bytes, as `NameTable` left them or empty. writer: identifies the worker, not 0. wanted: patterns."""
        if len(memory) != SIZE:
            raise ValueError(f"{len(memory)} bytes; a table of names has {SIZE}")
        if bytes(memory[:8]) != _MAGIC:
            memory[8:SIZE] = bytes(SIZE - 8)
            memory[8:24] = seed
            memory[:8] = _MAGIC
        self._memory = memory
        self._seed = bytes(memory[8:24])
        self._wanted = Patterns(wanted, caseless=True)
        self.believed = frozenset(believed)
        self._region = self._take_region(writer)

    @property
    def writes(self) -> bool:
        """Whether there was a region for this worker."""
        return self._region is not None

    def learn(self, answer: DnsAnswer, now: float) -> None:
        """Take in an answer that is believed. now: seconds of the monotonic clock."""
        asked = answer.question.name
        # Each name on the way from the one that was asked for, with the time for which the way to it holds.
        ways: dict[str, tuple[int, tuple[str, ...]]] = {asked: (AT_MOST, (*self._standing_for(asked, now), asked))}
        for _ in range(_CHAIN):
            before = len(ways)
            for owner, target, seconds in answer.aliases:
                if owner in ways and target not in ways:
                    ways[target] = min(seconds, ways[owner][0]), (*ways[owner][1], target)
            if len(ways) == before:
                break
        for owner, packed, seconds in answer.addresses:
            if owner in ways:
                holds, names = ways[owner]
                for each in filter(self._wanted.match, names):
                    self._write(len(packed), packed, each, now, min(seconds, holds))
        if not answer.addresses or answer.question.kind in SERVICE:
            # The addresses of the host that is named are asked for by themselves.
            for target, (holds, names) in ways.items():
                for each in filter(self._wanted.match, names[:-1]):
                    self._write(_ALIAS, self._digest(target), each, now, holds)

    def names(self, packed: bytes, now: float) -> tuple[str, ...]:
        """The names that answers gave for an address, as far as a rule asks for them."""
        return tuple(dict.fromkeys(self._read(len(packed), packed, now)))

    def gave(self, name: str, packed: bytes, now: float) -> bool:
        """Whether an answer gave this address for a name."""
        return name in self._read(len(packed), packed, now)

    def _standing_for(self, target: str, now: float) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self._read(_ALIAS, self._digest(target), now)))

    def _digest(self, name: str) -> bytes:
        import hashlib

        return hashlib.blake2b(name.encode(), digest_size=16, key=self._seed).digest()

    def _take_region(self, writer: int) -> int | None:
        owners = [_ONE.unpack_from(self._memory, _OWNERS + 4 * region)[0] for region in range(REGIONS)]
        region = owners.index(writer) if writer in owners else owners.index(0) if 0 in owners else None
        if region is not None:
            _ONE.pack_into(self._memory, _OWNERS + 4 * region, writer)
        return region

    def _hash(self, kind: int, key: bytes) -> tuple[int, int]:
        """The first place of the row, and the tag."""
        import hashlib

        number = int.from_bytes(hashlib.blake2b(bytes((kind,)) + key, digest_size=8, key=self._seed).digest(), "little")
        return number % _ROWS * WAYS, number >> 32 or 1

    def _read(self, kind: int, key: bytes, now: float) -> Iterator[str]:
        row, tag = self._hash(kind, key)
        for region in range(REGIONS):
            if _ONE.unpack_from(self._memory, _OWNERS + 4 * region)[0] == 0:
                return
            base = _HEAD + region * _REGION
            tags = _ROW.unpack_from(self._memory, base + 4 * row)
            if tag not in tags:
                continue
            ends = _ROW.unpack_from(self._memory, base + 4 * PLACES + 4 * row)
            for place, each in enumerate(tags):
                if each == tag and ends[place] >= now and (found := self._record(base, row + place, kind, key)) is not None:
                    yield found

    def _record(self, base: int, place: int, kind: int, key: bytes) -> str | None:
        """The name of a record; None where it is another key's, or is being written."""
        at = base + 8 * PLACES + RECORD * place
        known, packed, length = _KEY.unpack_from(self._memory, at)
        text = bytes(self._memory[at + _KEY.size : at + _KEY.size + length])
        if known != kind or packed[: len(key)] != key or _ONE.unpack_from(self._memory, base + 4 * place)[0] == 0:
            return None
        return text.decode("ascii", "replace")

    def _write(self, kind: int, key: bytes, name: str, now: float, seconds: int) -> None:
        text = name.encode("ascii", "replace")
        if self._region is None or len(text) > LONGEST:
            return
        end = int(now) + 1 + min(max(seconds, AT_LEAST), AT_MOST)
        row, tag = self._hash(kind, key)
        base = _HEAD + self._region * _REGION
        tags = _ROW.unpack_from(self._memory, base + 4 * row)
        ends = _ROW.unpack_from(self._memory, base + 4 * PLACES + 4 * row)
        place = next(
            (place for place, each in enumerate(tags) if each == tag and self._record(base, row + place, kind, key) == name), None
        )
        if place is not None:
            end = max(end, ends[place]) if ends[place] <= int(now) + 1 + AT_MOST else end
        else:
            # A time that has passed, as an empty place has, is less than any other.
            place = ends.index(min(ends))
        at = base + 8 * PLACES + RECORD * (row + place)
        # It is invisible while it is written.
        _ONE.pack_into(self._memory, base + 4 * (row + place), 0)
        _KEY.pack_into(self._memory, at, kind, key, len(text))
        self._memory[at + _KEY.size : at + _KEY.size + len(text)] = text
        _ONE.pack_into(self._memory, base + 4 * PLACES + 4 * (row + place), end)
        _ONE.pack_into(self._memory, base + 4 * (row + place), tag)
