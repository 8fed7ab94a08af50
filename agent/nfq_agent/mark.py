"""Marks under a mask, as packets and connections carry them, and the values of one that keep the verdicts on flows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Final, NamedTuple
from zlib import crc32

from nfq_agent.field import BeforeValidator


@dataclass(frozen=True, slots=True)
class Mark:
    """A packet or connection mark under a mask: only the bits of the mask are looked at, or set."""

    value: int
    mask: int = 0xFFFFFFFF

    def __str__(self) -> str:
        return f"{self.value:#x}/{self.mask:#x}"

    def on(self, mark: int) -> int:
        """A 32-bit mark with the bits of the mask set to the value, and the others as they were."""
        return (mark & ~self.mask) | self.value


# The mark of the packets that a proxy of nfq-agent sends to destinations, so that no instance takes them again.
OWN_TRAFFIC: Final = Mark(0x1000, 0x1000)
# The bits of connection marks that say by which rule's owner a connection was begun, unless the configuration says otherwise.
OWNERS_MASK: Final = 0x700
_MARK: Final = '"VALUE/MASK", as in "0x10/0xff"'


def parse_mask(value: object) -> object:
    """The number of a mask that is written as `"0x700"`; anything else as it is."""
    try:
        return int(value, 0) if isinstance(value, str) else value
    except ValueError:
        raise ValueError(f'{value!r} is not a mask; allowed: bits of a mark, as in "0x700"') from None


def owner_marks(names: Iterable[str], mask: int) -> dict[str, Mark]:
    """The mark of each rule's connections, under a mask of n bits: at most 2^n - 1 of them.

    It follows from the name as far as others leave it free, so that connections keep theirs when another rule comes or goes.
    Raises ValueError where there are more names than marks.
    """
    number = (1 << mask.bit_count()) - 1
    names = sorted(names)
    if len(names) > number:
        raise ValueError(f"{len(names)} rules by owner, and the mask {mask:#x} has marks for {number}")
    marks: dict[str, Mark] = {}
    taken: set[int] = set()
    for name in names:
        place = crc32(name.encode()) % number
        while place in taken:
            place = (place + 1) % number
        taken.add(place)
        marks[name] = Mark(_spread(1 + place, mask), mask)
    return marks


def _mark(value: object) -> Mark:
    if isinstance(value, Mark):
        return value
    if isinstance(value, str):
        first, slash, second = value.partition("/")
        try:
            mark = Mark(int(first, 0), int(second, 0) if slash else 0xFFFFFFFF)
        except ValueError:
            pass
        else:
            if not (0 <= mark.value <= 0xFFFFFFFF and 0 < mark.mask <= 0xFFFFFFFF):
                raise ValueError(f"{value!r} is not a mark: it and its mask have 32 bits, and a mask is not 0; allowed: {_MARK}")
            if mark.value & ~mark.mask:
                raise ValueError(f"mark {mark.value:#x} is outside its mask {mark.mask:#x}; allowed: bits of the mask")
            return mark
    raise ValueError(f"{value!r} is not a mark; allowed: {_MARK}")


MarkField = Annotated[Mark, BeforeValidator(_mark)]


class Kept(NamedTuple):
    """The connection marks for "accepted" and "denied"; both have the same mask, and neither value is 0."""

    accept: Mark
    deny: Mark

    @property
    def mask(self) -> int:
        """The bits that are ours."""
        return self.accept.mask


def kept(mark: Mark, generation: int) -> Kept:
    """The two marks of a generation of the policy. In generation 0 the given mark stands for "accepted".

    A mask of n bits has room for (2^n - 1) / 2 generations; after them the first comes again.
    """
    bits = mark.mask.bit_count()
    values = (1 << bits) - 1
    first = _squeeze(mark.value, mark.mask) - 1 + 2 * (generation % (values // 2))
    accept, deny = (_spread(1 + place % values, mark.mask) for place in (first, first + 1))
    return Kept(Mark(accept, mark.mask), Mark(deny, mark.mask))


def _bits(mask: int) -> list[int]:
    return [1 << place for place in range(32) if mask >> place & 1]


def _squeeze(value: int, mask: int) -> int:
    """The bits of `value` that lie under the mask, side by side."""
    return sum(1 << place for place, bit in enumerate(_bits(mask)) if value & bit)


def _spread(number: int, mask: int) -> int:
    """The reverse: the lowest bits of `number` put under the mask."""
    return sum(bit for place, bit in enumerate(_bits(mask)) if number >> place & 1)
