"""Many rules of a policy as entries of one map of the kernel: which fields of a packet lead to which verdict. No I/O.

An entry has a span of values for each field, and no two of a map overlap, so that their order does not matter.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv6Address, collapse_addresses
from typing import TYPE_CHECKING, Final, NamedTuple

from nfq_agent.packet import WITH_PORTS
from nfq_agent.rules.model import Family
from nfq_agent.rules.selection import port_lists

if TYPE_CHECKING:
    from nfq_agent.match import Conditions

# In the order of a key.
FIELDS: Final = ("src", "dst", "protocol", "sport", "dport")
# One rule with more is not put into a map.
_MOST_OF_A_RULE: Final = 256
# Entries that may overlap in the field with the most different values.
_MOST_SIDE_BY_SIDE: Final = 256
# The other conditions of a rule, for which there is no field.
_OTHERS: Final = ("interface", "direction", "hook", "uid", "gid")

# (first, last), both included.
Span = tuple[int, int]


class MapEntry(NamedTuple):
    """spans: by field. action: accept or drop; empty in a list without verdicts. number: of the rule in its policy."""

    spans: tuple[Span, ...]
    action: str
    number: int


def shape(rule: Conditions) -> tuple[str, ...]:
    """The fields that a rule asks for; none where it cannot be an entry of a map. The protocol is always one of them."""
    if any(getattr(rule, key) is not None for key in _OTHERS):
        return ()
    return tuple(field for field in FIELDS if field == "protocol" or getattr(rule, field) is not None)


def entries_of(rule: Conditions, action: str, number: int, family: Family) -> list[MapEntry] | None:
    """The entries of a rule; None where they are too many."""
    choices: list[Sequence[Span]] = []
    for field in shape(rule):
        if field == "protocol":
            wanted = protocols_of(rule)
            choices.append([(0, 255)] if wanted is None else [(number, number) for number in sorted(wanted)])
        elif field in ("src", "dst"):
            version = 4 if family == "inet" else 6
            networks = [each for each in getattr(rule, field) if each.version == version]
            merged = networks if len(networks) < 2 else collapse_addresses(networks)
            choices.append([(int(each.network_address), int(each.broadcast_address)) for each in merged])
        else:
            choices.append([_ports(word) for words in port_lists(getattr(rule, field), lists=True) for word in words.split(",")])
    size = 1
    for choice in choices:
        size *= len(choice)
    if size > _MOST_OF_A_RULE:
        return None
    return [MapEntry(spans, action, number) for spans in itertools.product(*choices)]


def protocols_of(rule: Conditions) -> set[int] | None:
    """The protocols of the IP header that a rule may meet; None for any."""
    wanted = None if rule.protocol is None else {each for each in rule.protocol if isinstance(each, int)}
    if rule.sport is None and rule.dport is None:
        return wanted
    return set(WITH_PORTS) if wanted is None else wanted & WITH_PORTS


def in_order(entries: Iterable[MapEntry]) -> tuple[MapEntry, ...]:
    """By their rules: the order in which a map has them, wherever they come from."""
    return tuple(sorted(entries, key=lambda each: (each.number, each.spans)))


def _ports(word: str) -> Span:
    first, _, last = word.partition(":")
    return int(first), int(last or first)


def apart(rules: Sequence[Sequence[MapEntry]]) -> Iterator[tuple[int, int]]:
    """(begin, end) of parts of a list of rules in each of which no two rules meet the same packet."""
    behind = _overlaps(rules)
    begin = 0
    for place in range(len(rules)):
        if behind.get(place, -1) >= begin:
            yield begin, place
            begin = place
    if begin < len(rules):
        yield begin, len(rules)


def _overlaps(rules: Sequence[Sequence[MapEntry]]) -> dict[int, int]:
    """By the place of a rule, that of the last one before it that meets packets of it too."""
    boxes = [(entry.spans, place) for place, entries in enumerate(rules) for entry in entries]
    if not boxes:
        return {}
    # Along the field with the most values, so that few lie over each other.
    along = max(range(len(boxes[0][0])), key=lambda field: len({spans[field] for spans, _ in boxes}))
    boxes.sort(key=lambda box: box[0][along])
    found: dict[int, int] = {}
    active: list[tuple[tuple[Span, ...], int]] = []
    for spans, place in boxes:
        if len(active) > _MOST_SIDE_BY_SIDE:
            # Too many to compare: each rule by itself.
            return {each: each - 1 for each in range(1, len(rules))}
        first = spans[along][0]
        active = [each for each in active if each[0][along][1] >= first]
        for others, other in active:
            if other != place and all(one[0] <= two[1] and two[0] <= one[1] for one, two in zip(spans, others, strict=True)):
                low, high = sorted((place, other))
                found[high] = max(found.get(high, -1), low)
        active.append((spans, place))
    return found


def _v4(address: int) -> str:
    """As `ipaddress` writes it, in a fraction of the time: there may be thousands."""
    return f"{address >> 24}.{address >> 16 & 255}.{address >> 8 & 255}.{address & 255}"


@functools.lru_cache(maxsize=32)
def words(entries: tuple[MapEntry, ...], fields: tuple[str, ...], family: Family) -> str:
    """The entries as a rule has them: `10.0.0.0-10.0.0.255/6/80=drop.3,...`."""
    made: list[str] = []
    for spans, action, number in entries:
        parts: list[str] = []
        for field, (first, last) in zip(fields, spans, strict=True):
            if field in ("src", "dst"):
                one, two = (_v4(value) if family == "inet" else str(IPv6Address(value)) for value in (first, last))
            else:
                one, two = str(first), str(last)
            parts.append(one if first == last else f"{one}-{two}")
        made.append("/".join(parts) + (f"={action}.{number}" if action else ""))
    return ",".join(made)


@functools.lru_cache(maxsize=32)
def parsed(text: str) -> tuple[MapEntry, ...]:
    """The reverse. Raises ValueError."""
    made = []
    for word in text.split(","):
        key, _, verdict = word.partition("=")
        action, _, number = verdict.partition(".")
        made.append(MapEntry(tuple(map(_span, key.split("/"))), action, int(number or 0)))
    return tuple(made)


def _span(word: str) -> Span:
    first, _, last = word.partition("-")
    return _value(first), _value(last or first)


def _value(word: str) -> int:
    if word.isdecimal():
        return int(word)
    return int(IPv6Address(word)) if ":" in word else int.from_bytes(bytes(map(int, word.split("."))), "big")
