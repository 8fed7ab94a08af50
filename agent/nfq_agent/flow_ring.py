"""A ring of records in memory that a worker writes and its supervisor reads: neither waits, and what was overwritten is counted.

The supervisor also writes into it: until when records of flows are wanted, and in a few slots which packets are traced, a filter
in each. A worker that is not watched reads one number from it now and then, and writes nothing.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from zlib import crc32

SIZE: Final = 1 << 20
# Offsets of numbers: until when anything is wanted, and records of flows (ns of the monotonic clock); bytes and records written;
# records left out; readers of flows that have begun; flows that are not reported now; packets that no trace looked at.
_UNTIL, _FLOWS, _WRITTEN, _RECORDS, _LEFT_OUT, _BEGUN, _UNSHOWN, _UNLOOKED = 0, 8, 16, 24, 32, 40, 48, 56
# Filters that are traced at the same time.
SLOTS: Final = 8
_SLOT: Final = 4096
# In a slot: until when it is wanted, packets left out of it, the filter.
_SLOT_UNTIL, _SLOT_LEFT_OUT, _SLOT_FILTER = 0, 8, 16
# The longest filter, in bytes.
MOST_FILTER: Final = 4000
_START: Final = _SLOT * (SLOTS + 1)
_RECORD: Final = struct.Struct("=II")
_NUMBER: Final = struct.Struct("=Q")


@dataclass(frozen=True, slots=True)
class RingPlace:
    """How far a reader has come: bytes and records, and records that the worker left out."""

    written: int = 0
    records: int = 0
    left_out: int = 0


class FlowRing:
    """Made before the fork; the worker calls `write`, the supervisor the other methods."""

    def __init__(self, size: int = SIZE) -> None:
        self._size = size
        # The system gives pages when they are written to.
        self._memory = mmap.mmap(-1, _START + size)

    def _get(self, offset: int) -> int:
        number: int = _NUMBER.unpack_from(self._memory, offset)[0]
        return number

    def _put(self, offset: int, number: int) -> None:
        _NUMBER.pack_into(self._memory, offset, number)

    @property
    def until(self) -> int:
        """Until when anything is wanted, in nanoseconds of the monotonic clock; 0 at first."""
        return self._get(_UNTIL)

    @property
    def flows_until(self) -> int:
        """Until when records of flows are wanted."""
        return self._get(_FLOWS)

    @property
    def begun(self) -> int:
        """Readers of flows that have begun."""
        return self._get(_BEGUN)

    def begin(self) -> None:
        """Have all flows reported again, for a new reader."""
        self._put(_BEGUN, self.begun + 1)

    def want_flows(self, until: int) -> None:
        """Ask for records of flows until then."""
        self._put(_FLOWS, until)
        self._put(_UNTIL, until)

    def want_packets(self, until: int, what: str, now: int) -> int | None:
        """Ask for the packets that a filter matches. Returns its slot, which clients with the same filter share.

        None if all slots have other filters. now: nanoseconds of the monotonic clock.
        """
        slot = next((slot for slot, text in self.filters(now).items() if text == what), None)
        if slot is None:
            slot = next((slot for slot in range(SLOTS) if self._get(_at(slot, _SLOT_UNTIL)) <= now), None)
            if slot is None:
                return None
            text = what.encode()
            struct.pack_into(f"=I{len(text)}sI", self._memory, _at(slot, _SLOT_FILTER), len(text), text, crc32(text))
        self._put(_at(slot, _SLOT_UNTIL), until)
        self._put(_UNTIL, until)
        return slot

    def filters(self, now: int) -> Mapping[int, str]:
        """The filters of packets that are traced, by their slots. now: nanoseconds of the monotonic clock."""
        found = {}
        for slot in range(SLOTS):
            if self._get(_at(slot, _SLOT_UNTIL)) > now and (text := self._filter(slot)) is not None:
                found[slot] = text
        return found

    def _filter(self, slot: int) -> str | None:
        at = _at(slot, _SLOT_FILTER)
        (length,) = struct.unpack_from("=I", self._memory, at)
        if length > MOST_FILTER:
            return None
        text, check = struct.unpack_from(f"={length}sI", self._memory, at + 4)
        # Half written: it is whole the next time.
        return bytes(text).decode(errors="replace") if check == crc32(text) else None

    def leave_out(self, count: int = 1) -> None:
        """Count records that are not written."""
        self._put(_LEFT_OUT, self._get(_LEFT_OUT) + count)

    @property
    def unshown(self) -> int:
        """Flows that pass now and are not reported: there are too many."""
        return self._get(_UNSHOWN)

    @unshown.setter
    def unshown(self, count: int) -> None:
        self._put(_UNSHOWN, count)

    @property
    def unlooked(self) -> int:
        """Packets that were not looked at for any trace so far: there were too many."""
        return self._get(_UNLOOKED)

    def leave_unlooked(self, count: int) -> None:
        """Count packets that are not looked at for any trace."""
        self._put(_UNLOOKED, self._get(_UNLOOKED) + count)

    def leave_out_packet(self, slot: int) -> None:
        """Count a traced packet that is not written, though the filter of this slot matches it."""
        self._put(_at(slot, _SLOT_LEFT_OUT), self._get(_at(slot, _SLOT_LEFT_OUT)) + 1)

    def write(self, record: bytes) -> None:
        """Add a record, over the oldest ones. A record that is longer than an eighth of the ring is left out."""
        entry = _RECORD.pack(len(record), crc32(record)) + record
        if len(entry) > self._size // 8:
            self.leave_out()
            return
        written = self._get(_WRITTEN)
        at = written % self._size
        first = entry[: self._size - at]
        self._memory[_START + at : _START + at + len(first)] = first
        if rest := entry[len(first) :]:
            self._memory[_START : _START + len(rest)] = rest
        self._put(_RECORDS, self._get(_RECORDS) + 1)
        self._put(_WRITTEN, written + len(entry))

    def read(self, place: RingPlace, slot: int | None = None) -> tuple[list[bytes], RingPlace, int]:
        """The records since a place, the new place, and how many records were missed in between.

        slot: of the reader's filter; without it traced packets that were left out are not counted.
        """
        written, records, left_out = self._get(_WRITTEN), self._get(_RECORDS), self._get(_LEFT_OUT)
        if slot is not None:
            left_out += self._get(_at(slot, _SLOT_LEFT_OUT))
        if place.written > written:
            # Another ring: the worker's settings were changed.
            place = RingPlace()
        missed = max(0, left_out - place.left_out)
        end = RingPlace(written, records, left_out)
        # An eighth is left to the writer meanwhile.
        if written - place.written > self._size - self._size // 8:
            return [], end, missed + records - place.records
        found = self._entries(place.written, written)
        return found, end, missed + max(0, records - place.records - len(found))

    def _entries(self, at: int, end: int) -> list[bytes]:
        data = self._slice(at, end - at)
        found: list[bytes] = []
        place = 0
        while place + _RECORD.size <= len(data):
            length, check = _RECORD.unpack_from(data, place)
            record = data[place + _RECORD.size : place + _RECORD.size + length]
            if crc32(record) != check:
                break
            found.append(record)
            place += _RECORD.size + length
        return found

    def _slice(self, at: int, length: int) -> bytes:
        first = _START + at % self._size
        end = _START + self._size
        data = self._memory[first : min(first + length, end)]
        return data + self._memory[_START : _START + length - len(data)]


def _at(slot: int, offset: int) -> int:
    """Where something of a slot is."""
    return _SLOT * (slot + 1) + offset
