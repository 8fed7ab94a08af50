"""Marks of the connections of an owner: each rule has its own, under the mask, and keeps it."""

from __future__ import annotations

from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from nfq_agent.mark import Kept, Mark, MarkField, kept, owner_marks


@given(st.sets(st.text("abcdef", min_size=1, max_size=4), max_size=7), st.sampled_from([0x700, 0x38000000, 0x80000101]))
def test_each_rule_has_a_mark_of_its_own_under_the_mask(names: set[str], mask: int) -> None:
    marks = owner_marks(names, mask)
    assert set(marks) == names
    assert len({mark.value for mark in marks.values()}) == len(names)
    for mark in marks.values():
        assert mark.mask == mask
        assert mark.value
        assert not mark.value & ~mask


def test_a_rule_keeps_its_mark_when_another_one_goes() -> None:
    assert owner_marks(["web", "mail"], 0xFF00)["web"] == owner_marks(["web"], 0xFF00)["web"]


def test_more_rules_than_marks() -> None:
    with pytest.raises(ValueError, match="4 rules by owner, and the mask 0x3 has marks for 3"):
        owner_marks("abcd", 3)


@pytest.mark.parametrize("text", ["0x100000000/0xff", "0x1/0x100000000", "0/0", "-1/0xff", "0x1/-1"])
def test_a_mark_and_its_mask_have_32_bits(text: str) -> None:
    with pytest.raises(ValueError, match="32 bits, and a mask is not 0"):
        TypeAdapter(MarkField).validate_python(text)


def test_all_bits_are_a_mark() -> None:
    assert TypeAdapter(MarkField).validate_python("0xffffffff") == Mark(0xFFFFFFFF, 0xFFFFFFFF)


def test_a_name_whose_mark_is_taken_gets_the_next_one() -> None:
    """It keeps its mark over an upgrade of the agent: connections carry it."""
    names = sorted(f"rule{number}" for number in range(40))
    first = names[0]
    second = next(name for name in names[1:] if crc32(name.encode()) % 7 == crc32(first.encode()) % 7)
    marks = owner_marks([second, first], 0x700)
    number = crc32(first.encode()) % 7
    assert marks[first] == Mark((1 + number) << 8, 0x700)
    assert marks[second] == Mark((1 + (number + 1) % 7) << 8, 0x700)


@pytest.mark.parametrize(
    ("mark", "generation", "accept", "deny"),
    [
        (Mark(0x10000, 0xFF0000), 0, 0x10000, 0x20000),
        (Mark(0x10000, 0xFF0000), 1, 0x30000, 0x40000),
        (Mark(0x10000, 0xFF0000), 126, 0xFD0000, 0xFE0000),
        # 127 pairs of 255 values; then the first pair again.
        (Mark(0x10000, 0xFF0000), 127, 0x10000, 0x20000),
        (Mark(0xFF0000, 0xFF0000), 0, 0xFF0000, 0x10000),
        (Mark(0x300000, 0xFF0000), 126, 0x2D0000, 0x2E0000),
        # Bits of the mask with a gap between them.
        (Mark(0x100, 0xF0F), 0, 0x100, 0x101),
        (Mark(0x10F, 0xF0F), 0, 0x10F, 0x200),
    ],
)
def test_the_marks_of_a_generation(mark: Mark, generation: int, accept: int, deny: int) -> None:
    assert kept(mark, generation) == Kept(Mark(accept, mark.mask), Mark(deny, mark.mask))


def test_a_mark_sets_the_bits_of_its_mask_alone() -> None:
    assert Mark(0x10, 0xF0).on(0xFFFFFFFF) == 0xFFFFFF1F
    assert Mark(0x10, 0xF0).on(0) == 0x10
    assert str(Mark(0x10, 0xF0)) == "0x10/0xf0"
