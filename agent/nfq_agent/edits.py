"""The steps from one list to another that leave in place what both have, for rules that keep their counters. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# What is done, the place in the list before (first, behind the last), and that in the list after: as `difflib` has it.
Opcode = tuple[str, int, int, int, int]


def edits(before: Sequence[Any], after: Sequence[Any]) -> list[Opcode]:
    """The steps in their order: `equal`, `insert`, `delete` or `replace`, as SequenceMatcher.get_opcodes of `difflib`.

    That module is loaded only where each list has something in its middle that the other has not: a start finds nothing there,
    a stop wants nothing, and most changes are in one place.
    """
    most = min(len(before), len(after))
    head = next((place for place in range(most) if before[place] != after[place]), most)
    tail = next((place for place in range(most - head) if before[-1 - place] != after[-1 - place]), most - head)
    old, new = len(before) - tail, len(after) - tail
    if head < old and head < new:
        try:
            from difflib import SequenceMatcher
        except ImportError:
            # As where no descriptor is left to read it: the whole middle is made again.
            pass
        else:
            return [(*each,) for each in SequenceMatcher(None, before, after, autojunk=False).get_opcodes()]
    found = [
        ("equal", 0, head, 0, head),
        ("replace" if head < old and head < new else "insert" if head < new else "delete", head, old, head, new),
        ("equal", old, len(before), new, len(after)),
    ]
    return [each for each in found if each[1] < each[2] or each[3] < each[4]]
