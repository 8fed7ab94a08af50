"""The steps from one list to another: they lead there, leave what stays, and need difflib only for a mixed middle."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import SequenceMatcher

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfq_agent.edits import Opcode, edits

LISTS = st.lists(st.integers(0, 6), max_size=9)


def done(before: Sequence[int], after: Sequence[int], steps: Sequence[Opcode]) -> list[int]:
    """The list that the steps make of `before`. Each part of both lists is in one step, in order."""
    made: list[int] = []
    old = new = 0
    for kind, first, last, begin, end in steps:
        assert (first, begin) == (old, new)
        assert first < last or begin < end
        assert kind != "equal" or before[first:last] == after[begin:end]
        assert {"equal": last - first == end - begin, "insert": first == last, "delete": begin == end}.get(kind, True)
        made += before[first:last] if kind == "equal" else after[begin:end]
        old, new = last, end
    assert (old, new) == (len(before), len(after))
    return made


@given(LISTS, LISTS)
def test_the_steps_lead_there(before: list[int], after: list[int]) -> None:
    assert done(before, after, edits(before, after)) == after


@given(LISTS, LISTS)
def test_as_much_stays_as_difflib_finds(before: list[int], after: list[int]) -> None:
    def stay(steps: Sequence[Opcode]) -> int:
        return sum(last - first for kind, first, last, _, _ in steps if kind == "equal")

    theirs = [(*each,) for each in SequenceMatcher(None, before, after, autojunk=False).get_opcodes()]
    assert stay(edits(before, after)) >= stay(theirs)


@pytest.mark.parametrize(
    ("before", "after", "steps"),
    [
        ("", "", []),
        ("ab", "ab", [("equal", 0, 2, 0, 2)]),
        ("", "ab", [("insert", 0, 0, 0, 2)]),
        ("ab", "", [("delete", 0, 2, 0, 0)]),
        ("ac", "abc", [("equal", 0, 1, 0, 1), ("insert", 1, 1, 1, 2), ("equal", 1, 2, 2, 3)]),
        ("abc", "ac", [("equal", 0, 1, 0, 1), ("delete", 1, 2, 1, 1), ("equal", 2, 3, 1, 2)]),
        ("aa", "a", [("equal", 0, 1, 0, 1), ("delete", 1, 2, 1, 1)]),
        # Without difflib the middle is one step.
        ("a-b-c", "a+b+c", [("equal", 0, 1, 0, 1), ("replace", 1, 4, 1, 4), ("equal", 4, 5, 4, 5)]),
    ],
)
def test_where_difflib_cannot_be_loaded(before: str, after: str, steps: list[Opcode], monkeypatch: pytest.MonkeyPatch) -> None:
    # As with no descriptor left to read it. All others are made without it.
    monkeypatch.setitem(sys.modules, "difflib", None)
    assert edits(before, after) == steps
