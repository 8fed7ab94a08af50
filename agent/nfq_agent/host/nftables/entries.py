"""Sets and maps of nf_tables whose keys are several fields of a packet, and the expressions that look them up."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Final

from nfq_agent.host.attributes import attribute, attributes
from nfq_agent.host.nftables.netlink import nested, text, u32
from nfq_agent.rules.entries import MapEntry, in_order
from nfq_agent.rules.model import Family

# NFT_SET_INTERVAL, NFT_SET_MAP, NFT_SET_CONCAT
_INTERVAL, _MAP, _CONCATENATED = 0x4, 0x8, 0x80
_VERDICT_DATA: Final = 0xFFFFFF00
# Bytes of each field, and nft's number for its datatype, by which it lists a set (include/datatype.h): six bits each.
_SIZES: Final = {"ipv4": 4, "ipv6": 16, "protocol": 1, "port": 2}
_DATATYPES: Final = {"ipv4": 7, "ipv6": 8, "protocol": 12, "port": 13}
_KINDS: Final = {number: kind for kind, number in _DATATYPES.items()}
_TYPE_BITS: Final = 6
_WORD: Final = 4
# An attribute holds 65,535 bytes, and an element of the longest key 150.
_ENTRIES_PER_MESSAGE: Final = 400
_VERDICTS: Final = {"drop": 0, "accept": 0xFFFFFFFB}
_ACTIONS: Final = {code: action for action, code in _VERDICTS.items()}
# The number of a rule, in the user data of an element.
_NUMBER: Final = Struct(">I")
_COUNTER: Final = nested(17, text(1, "counter"))
# Where a field is: base and offset of a payload, by family.
_PLACES: Final = {("src", "inet"): (1, 12), ("dst", "inet"): (1, 16), ("src", "inet6"): (1, 8), ("dst", "inet6"): (1, 24),
                  ("sport", ""): (2, 0), ("dport", ""): (2, 2)}  # fmt: skip
_META_L4PROTO: Final = 16


def kinds_of(fields: Sequence[str], family: Family) -> tuple[str, ...]:
    """The kind of each field."""
    address = "ipv4" if family == "inet" else "ipv6"
    return tuple(address if field in ("src", "dst") else "protocol" if field == "protocol" else "port" for field in fields)


def kinds_of_type(number: int) -> tuple[str, ...]:
    """The kinds of a key of several fields; empty for another key."""
    kinds = []
    while number:
        kinds.append(_KINDS.get(number & (1 << _TYPE_BITS) - 1, ""))
        number >>= _TYPE_BITS
    return tuple(reversed(kinds)) if len(kinds) > 1 and all(kinds) else ()


@dataclass(frozen=True, slots=True)
class EntrySet:
    """A set, or a map to verdicts whose elements count. kinds: of its fields. intervals: its entries."""

    name: str
    kinds: tuple[str, ...]
    intervals: tuple[MapEntry, ...]
    is_map: bool

    def declaration(self, number: int) -> bytes:
        """The attributes of NEW_SET besides the table's name. number: NFTA_SET_ID, of its own within a batch."""
        flags = _INTERVAL | _CONCATENATED | (_MAP if self.is_map else 0)
        datatype = functools.reduce(lambda made, kind: made << _TYPE_BITS | _DATATYPES[kind], self.kinds, 0)
        lengths = [nested(1, u32(1, _SIZES[kind])) for kind in self.kinds]
        size = sum(map(_padded, self.kinds))
        parts = [text(2, self.name), u32(3, flags), u32(4, datatype), u32(5, size)]
        if self.is_map:
            parts.append(u32(6, _VERDICT_DATA))
        parts += [nested(9, nested(2, *lengths)), u32(10, number)]
        if self.is_map:
            parts.append(_COUNTER)
        return b"".join(parts)

    def element_lists(self, entries: Iterable[MapEntry]) -> Iterator[bytes]:
        """NFTA_SET_ELEM_LIST_ELEMENTS with these entries, as many as are needed."""
        packed = [self._packed(entry) for entry in entries]
        for begin in range(0, len(packed), _ENTRIES_PER_MESSAGE):
            yield nested(3, *packed[begin : begin + _ENTRIES_PER_MESSAGE])

    def _packed(self, entry: MapEntry) -> bytes:
        first, last = (
            b"".join(
                span[end].to_bytes(_SIZES[kind], "big").ljust(_padded(kind), b"\0")
                for kind, span in zip(self.kinds, entry.spans, strict=True)
            )
            for end in (0, 1)
        )
        parts = [nested(1, attribute(1, first)), nested(10, attribute(1, last))]
        if self.is_map:
            parts += [nested(2, nested(2, u32(1, _VERDICTS[entry.action]))), attribute(6, _NUMBER.pack(entry.number))]
        return nested(1, *parts)


def _padded(kind: str) -> int:
    return -(-_SIZES[kind] // _WORD) * _WORD


def read(name: str, kinds: tuple[str, ...], is_map: bool, elements: Iterable[bytes]) -> tuple[EntrySet, dict[int, int]]:
    """A dumped set, and the packets that its elements counted, by the number of the rule. Raises KeyError, ValueError.

    elements: each NFTA_SET_ELEM_LIST_ELEMENTS of it.
    """
    found: list[MapEntry] = []
    packets: dict[int, int] = {}
    for data in elements:
        for _, element in attributes(data):
            members = dict(attributes(element))
            first = _values(dict(attributes(members[1]))[1], kinds)
            last = _values(dict(attributes(members[10]))[1], kinds) if 10 in members else first
            spans = tuple(zip(first, last, strict=True))
            action, number = "", 0
            if is_map:
                verdict = dict(attributes(dict(attributes(members[2]))[2]))
                action = _ACTIONS[int.from_bytes(verdict[1], "big")]
                (number,) = _NUMBER.unpack(members[6])
                packets[number] = packets.get(number, 0) + _count(members.get(7, b""))
            found.append(MapEntry(spans, action, number))
    return EntrySet(name, kinds, in_order(found), is_map), packets


def _values(key: bytes, kinds: Sequence[str]) -> tuple[int, ...]:
    place = 0
    values = []
    for kind in kinds:
        values.append(int.from_bytes(key[place : place + _SIZES[kind]], "big"))
        place += _padded(kind)
    return tuple(values)


def _count(expression: bytes) -> int:
    members = dict(attributes(expression))
    counter = dict(attributes(members.get(2, b"")))
    # NFTA_COUNTER_PACKETS
    return int.from_bytes(counter.get(2, b""), "big")


def loads(fields: Sequence[str], family: Family) -> Iterator[tuple[str, bytes]]:
    """The name and the attributes of the expressions that put the fields one behind the other, from the first register on."""
    word = 0
    for field, kind in zip(fields, kinds_of(fields, family), strict=True):
        if field == "protocol":
            yield "meta", u32(1, _register(word)) + u32(2, _META_L4PROTO)
        else:
            base, offset = _PLACES.get((field, family)) or _PLACES[field, ""]
            yield "payload", u32(1, _register(word)) + u32(2, base) + u32(3, offset) + u32(4, _SIZES[kind])
        word += _padded(kind) // _WORD


def _register(word: int) -> int:
    """The number of a register of 32 bits: as the kernel tells it, that of a register of 128 bits where one begins there."""
    return 1 + word // 4 if word % 4 == 0 else 8 + word


def lookup(name: str, is_map: bool, negated: bool) -> bytes:
    """The attributes of the expression that looks the fields up: in a map, for a verdict; in a set, whether it has them.

    negated: whether it has them not.
    """
    # NFT_LOOKUP_F_INV
    return text(1, name) + u32(2, _register(0)) + (u32(3, 0) if is_map else u32(5, 1 if negated else 0))
