"""Named sets of ports and of addresses: the intervals of a list, as elements of nf_tables and back."""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from nfq_agent.host.attributes import attribute, attributes
from nfq_agent.host.nftables.netlink import nested, u32
from nfq_agent.rules.group_tree import in_set

# (first, last), both included.
Interval = tuple[int, int]

# NFTA_SET_FLAGS and NFTA_SET_ELEM_FLAGS
_INTERVAL: Final = 4
# The kind of sets that hold single values.
_SINGLE: Final = "cgroup"
_INTERVAL_END: Final = 1
# nft's numbers for its own datatypes, by which it lists a set (include/datatype.h).
DATATYPES: Final = {"port": 13, "ipv4": 7, "ipv6": 8, "cgroup": 46}
_SIZES: Final = {"port": 2, "ipv4": 4, "ipv6": 16, "cgroup": 8}
# Where the value is in an NFTA_LIST_ELEM: behind three headers of attributes.
_VALUE: Final = 12
# An attribute holds 65,535 bytes.
_ELEMENTS_PER_MESSAGE: Final = 1000


@dataclass(frozen=True, slots=True)
class NamedSet:
    """A set of nf_tables. kind: "port", "ipv4", "ipv6" or "cgroup". intervals: in rising order, none in another."""

    name: str
    kind: str
    intervals: tuple[Interval, ...]

    def declaration(self, number: int) -> bytes:
        """The attributes of NEW_SET besides the table's name. number: NFTA_SET_ID, of its own within a batch."""
        flags = 0 if self.kind == _SINGLE else _INTERVAL
        return b"".join(
            (
                attribute(2, self.name.encode() + b"\0"), u32(3, flags), u32(4, DATATYPES[self.kind]),
                u32(5, _SIZES[self.kind]), u32(10, number),
            )
        )  # fmt: skip

    def element_lists(self, intervals: Iterable[Interval]) -> Iterator[bytes]:
        """NFTA_SET_ELEM_LIST_ELEMENTS with these intervals of it, as many as are needed."""
        packed = _packed(tuple(intervals), self.kind)
        for begin in range(0, len(packed), _ELEMENTS_PER_MESSAGE):
            yield nested(3, *packed[begin : begin + _ELEMENTS_PER_MESSAGE])


def _usual_marks(data: bytes, kind: str) -> list[tuple[int, int]]:
    """What `_mark` gives for each element, where each has a key, and flags at most; else nothing. It is many times faster."""
    start, end = _shapes(kind)
    found = _pattern(kind).findall(data)
    ends = sum(map(bool, (past for _, past in found)))
    if ends * len(end) + (len(found) - ends) * len(start) != len(data):
        # Something else lies between those that were found.
        return []
    return [(int.from_bytes(first or past, "big"), 1 if first else 0) for first, past in found]


@functools.cache
def _shapes(kind: str) -> tuple[bytes, bytes]:
    """The NFTA_LIST_ELEM of the value 0 that begins an interval, and the one that ends one."""
    key = nested(1, attribute(1, bytes(_SIZES[kind])))
    return nested(1, key), nested(1, key, u32(3, _INTERVAL_END))


@functools.cache
def _pattern(kind: str) -> re.Pattern[bytes]:
    """Matches one element. Groups: the value that begins an interval, and the one that ends one."""
    size = _SIZES[kind]
    parts = [re.escape(each[:_VALUE]) + b"(.{%d})" % size + re.escape(each[_VALUE + size :]) for each in _shapes(kind)]
    return re.compile(b"|".join(parts), re.DOTALL)


def _mark(element: bytes) -> tuple[int, int]:
    """(value, 1 where an interval begins and 0 where one ends): at the same value one ends before another begins."""
    found = dict(attributes(element))
    (_, key_data), *_ = attributes(found[1])
    is_end = 3 in found and int.from_bytes(found[3], "big") & _INTERVAL_END
    return int.from_bytes(key_data, "big"), 0 if is_end else 1


# Both families have the same lists of ports.
@functools.lru_cache(maxsize=8)
def _packed(intervals: tuple[Interval, ...], kind: str) -> list[bytes]:
    """The elements, each an NFTA_LIST_ELEM."""
    size = _SIZES[kind]
    # Elements differ only in the value.
    start, end = _shapes(kind)
    before_start, after_start = start[:_VALUE], start[_VALUE + size :]
    before_end, after_end = end[:_VALUE], end[_VALUE + size :]
    bound = 1 << size * 8
    packed: list[bytes] = []
    for first, last in intervals:
        packed.append(before_start + first.to_bytes(size, "big") + after_start)
        # An interval that runs to the highest value has no end.
        if last + 1 < bound and kind != _SINGLE:
            packed.append(before_end + (last + 1).to_bytes(size, "big") + after_end)
    return packed


@functools.lru_cache(maxsize=32)
def intervals_of(elements: tuple[bytes, ...], kind: str) -> tuple[Interval, ...]:
    """The intervals of a dumped set. elements: each NFTA_SET_ELEM_LIST_ELEMENTS of it. Raises ValueError, KeyError."""
    data = b"".join(elements)
    marks = _usual_marks(data, kind) or [_mark(element) for _, element in attributes(data)]
    if kind == _SINGLE:
        return tuple((value, value) for value, _ in sorted(marks))
    intervals: list[Interval] = []
    begun: int | None = None
    for value, is_start in sorted(marks):
        if begun is not None:
            intervals.append((begun, value - 1))
        begun = value if is_start else None
    if begun is not None:
        intervals.append((begun, (1 << _SIZES[kind] * 8) - 1))
    return tuple(intervals)


@functools.lru_cache(maxsize=32)
def ports(words: str) -> tuple[Interval, ...]:
    """The intervals of `80,8000:8010`."""
    return tuple(_pair(word.split(":")) for word in words.split(","))


@functools.lru_cache(maxsize=32)
def port_words(intervals: tuple[Interval, ...]) -> str:
    """The reverse."""
    return ",".join(str(first) if first == last else f"{first}:{last}" for first, last in intervals)


def _pair(ends: Sequence[str]) -> Interval:
    return int(ends[0]), int(ends[-1])


@functools.lru_cache(maxsize=32)
def groups(words: str) -> tuple[Interval, ...]:
    """The intervals of numbers of control groups, `4711,4712`, in their order."""
    return tuple((number, number) for number in map(in_set, map(int, words.split(","))))


def group_words(intervals: Iterable[Interval]) -> str:
    """The reverse."""
    # The bytes of a number are turned once more.
    return ",".join(str(in_set(number)) for first, last in intervals for number in range(first, last + 1))


def addresses(words: str) -> tuple[Interval, ...]:
    """The intervals of `10.0.0.0-10.255.255.255,192.0.2.1-192.0.2.1`."""
    return tuple(
        (int(ipaddress.ip_address(first)), int(ipaddress.ip_address(last)))
        for first, _, last in (word.partition("-") for word in words.split(","))
    )


def address_words(intervals: Sequence[Interval], kind: str) -> str:
    """The reverse."""
    made = ipaddress.IPv4Address if kind == "ipv4" else ipaddress.IPv6Address
    return ",".join(f"{made(first)}-{made(last)}" for first, last in intervals)
