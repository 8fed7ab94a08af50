"""A legacy table as the kernel returns it: one piece of memory, in which our rules are found without decoding each one.

It is read, never written back. Formats: struct ipt_getinfo, ipt_get_entries and ipt_entry (linux/netfilter_ipv4/ip_tables.h)
and their likes for IPv6, linux/netfilter/x_tables.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from struct import Struct
from typing import Final

# IPT_SO_GET_INFO and IPT_SO_GET_ENTRIES; those of IPv6 have the same numbers.
_GET_INFO: Final = 64
_GET_ENTRIES: Final = 65
_LEVELS: Final = {socket.AF_INET: socket.IPPROTO_IP, socket.AF_INET6: socket.IPPROTO_IPV6}
# name, valid_hooks, hook_entry, underflow, num_entries, size.
_INFO: Final = Struct("=32sI5I5III")
# name, size; aligned to 8 bytes.
_ENTRIES: Final = Struct("=32sI4x")
_HOOKS: Final = (b"PREROUTING", b"INPUT", b"FORWARD", b"OUTPUT", b"POSTROUTING")
# struct ipt_entry and ip6t_entry: where target_offset and next_offset are, and the size of all before the matches.
_ENTRY: Final = {socket.AF_INET: (88, 112), socket.AF_INET6: (140, 168)}
_OFFSETS: Final = Struct("=HH").unpack_from
_VERDICT: Final = Struct("=i")
# struct xt_entry_target, and struct xt_error_target, which begins a chain of a user's with its name.
_TARGET: Final = 32
_HEAD: Final = 64
_VERDICTS: Final = {-1: b"DROP", -2: b"ACCEPT", -4: b"QUEUE", -5: b"RETURN"}
_TRIES: Final = 10
_libc: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Entry:
    """A rule. number: its place in the chain, from 1. jump: chain or verdict of a standard target, None for an extension's."""

    chain: bytes
    number: int
    data: bytes
    jump: bytes | None


class Image:
    """One table at one moment. version: changes whenever the number or the size of its rules does."""

    def __init__(self, family: socket.AddressFamily, table: str) -> None:
        """Ask the kernel for it. Raises OSError; ENOENT where there is no such table."""
        self._offsets, self._base = _ENTRY[family]
        with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as asking:
            for attempt in range(_TRIES):
                info = _info(asking, table)
                size: int = info[-1]
                data = bytearray(_ENTRIES.size + size)
                _ENTRIES.pack_into(data, 0, table.encode(), size)
                try:
                    _ask(asking, _GET_ENTRIES, data)
                    break
                except OSError as error:
                    # Its size has changed.
                    if error.errno != errno.EAGAIN or attempt == _TRIES - 1:
                        raise
        self.version = info[1:]
        # Not copied: it may be megabytes, and other processes may wait for the lock.
        self._data = data
        self._starts = self._walk(_ENTRIES.size, _ENTRIES.size + size)
        self._chains = self._find_chains(info)

    def _walk(self, place: int, end: int) -> list[int]:
        """Where each entry begins."""
        starts = []
        data, offset = self._data, self._offsets + 2
        next_offset = Struct("=H").unpack_from
        while place < end:
            starts.append(place)
            place += next_offset(data, place + offset)[0]
        return starts

    def _find_chains(self, info: tuple[int, ...]) -> list[tuple[int, int, bytes]]:
        """(first entry's place, place of what ends it, name) of every chain, in their order."""
        hooks, entries, ends = info[1], info[2:7], info[7:12]
        found = [
            (_ENTRIES.size + entries[hook], _ENTRIES.size + ends[hook], name)
            for hook, name in enumerate(_HOOKS)
            if hooks >> hook & 1
        ]
        data, base, starts = self._data, self._base, self._starts
        head = _HEAD.to_bytes(2, sys.byteorder) + b"ERROR\0"
        heads = []
        at = data.find(head)
        while at >= 0:
            place = at - base
            number = bisect_left(starts, place)
            if number < len(starts) and starts[number] == place and _OFFSETS(data, place + self._offsets)[0] == base:
                heads.append(number)
            at = data.find(head, at + 1)
        # The last one ends the table, and each ends the chain before it, behind that one's RETURN.
        for number, following in pairwise(heads):
            name = bytes(data[starts[number] + base + _TARGET : starts[number + 1]])
            found.append((starts[number + 1], starts[following - 1], name.split(b"\0")[0]))
        return sorted(found)

    @property
    def chains(self) -> list[bytes]:
        """The names of all chains."""
        return [name for _, _, name in self._chains]

    def policy(self, chain: bytes) -> bytes:
        """What happens to a packet at the end of a built-in chain: ACCEPT or DROP; empty where there is no such chain."""
        for _, end, name in self._chains:
            if name == chain:
                return _VERDICTS.get(self._verdict(end) or 0, b"")
        return b""

    def data_of(self, target: bytes) -> Iterator[bytes]:
        """What each rule with an extension's target of this name gives to it."""
        for place in self._places_of(target + b"\0"):
            entry = self._entry(place)
            first = _OFFSETS(entry, self._offsets)[0]
            if entry[first + 2 : first + 31].split(b"\0")[0] == target:
                yield entry[first + _TARGET :]

    def mentions(self, chains: frozenset[bytes], tag: bytes) -> bool:
        """Whether one of these chains is in it, or the tag in any rule."""
        return tag in self._data or any(name in chains for _, _, name in self._chains)

    def entries(self, chains: frozenset[bytes], tag: bytes) -> Iterator[Entry]:
        """Every rule of these chains, and any other in whose bytes the tag is found, chain by chain."""
        tagged = self._places_of(tag)
        for first, end, name in self._chains:
            if name in chains:
                places = self._starts[bisect_left(self._starts, first) : bisect_left(self._starts, end)]
            else:
                places = tagged[bisect_left(tagged, first) : bisect_left(tagged, end)]
            begin = bisect_left(self._starts, first) - 1
            for place in places:
                yield Entry(name, bisect_left(self._starts, place) - begin, self._entry(place), self._jump(place))

    def _places_of(self, needle: bytes) -> list[int]:
        """The entries in which these bytes are, each once."""
        found: list[int] = []
        at = self._data.find(needle)
        while at >= 0:
            number = bisect_right(self._starts, at) - 1
            found.append(self._starts[number])
            if number + 1 == len(self._starts):
                break
            at = self._data.find(needle, self._starts[number + 1])
        return found

    def _entry(self, place: int) -> bytes:
        return bytes(self._data[place : place + _OFFSETS(self._data, place + self._offsets)[1]])

    def _verdict(self, place: int) -> int | None:
        target = place + _OFFSETS(self._data, place + self._offsets)[0]
        # An empty name stands for the standard target (XT_STANDARD_TARGET).
        return _VERDICT.unpack_from(self._data, target + _TARGET)[0] if self._data[target + 2] == 0 else None

    def _jump(self, place: int) -> bytes | None:
        verdict = self._verdict(place)
        if verdict is None:
            return None
        if verdict < 0:
            return _VERDICTS.get(verdict, b"")
        # Nothing, which leads to the next entry, has no name.
        return next((name for first, _, name in self._chains if first - _ENTRIES.size == verdict), b"")

    def references(self, chain: bytes) -> int:
        """How many rules, ours or foreign, jump to a chain."""
        (first,) = [first for first, _, name in self._chains if name == chain]
        # Without the zeros around it, which are everywhere, it is found in a tenth of the time.
        verdict = first - _ENTRIES.size
        needle = _VERDICT.pack(verdict).strip(b"\0")
        return sum(self._verdict(place) == verdict for place in self._places_of(needle))


def _info(asking: socket.socket, table: str) -> tuple[int, ...]:
    data = bytearray(_INFO.size)
    data[: len(table)] = table.encode()
    _ask(asking, _GET_INFO, data)
    return _INFO.unpack(data)


def version(family: socket.AddressFamily, table: str) -> tuple[int, ...]:
    """The current `Image.version`. Raises OSError."""
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as asking:
        return _info(asking, table)[1:]


def _ask(asking: socket.socket, question: int, data: bytearray) -> None:
    """getsockopt(2) into `data`; Python's own takes 1,024 bytes at most."""
    size = ctypes.c_uint(len(data))
    buffer = (ctypes.c_char * len(data)).from_buffer(data)
    if _libc.getsockopt(asking.fileno(), _LEVELS[asking.family], question, buffer, ctypes.byref(size)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
