"""All control groups that a rule of the kernel may know, and which of them a condition on the owner means. No I/O."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from struct import Struct
from typing import Final

from nfq_agent.owner import Owner
from nfq_agent.patterns import Patterns
from nfq_agent.policy_rule import PolicyRule

# Of more groups no rule knows any, and all packets go to the queue.
MOST: Final = 16384
# The rules ask for groups up to this level; the root is at level 0. What is below goes to the queue.
DEEPEST: Final = 8
_NUMBER: Final = Struct("=Q")


class GroupTree:
    """Groups by their path, with their numbers. The groups below a known one are known too."""

    def __init__(self, groups: Iterable[tuple[int, str]] = ()) -> None:
        """groups: the number and the path of each."""
        numbers = {path: number for number, path in groups}
        self.numbers: Mapping[str, int] = numbers if len(numbers) <= MOST else {}
        self._found: dict[tuple[int, str], str] = {}
        self._owners: dict[str, Mapping[str, str]] = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GroupTree) and other.numbers == self.numbers

    __hash__ = None  # type: ignore[assignment]  # it is compared by what it holds

    def members(self, level: int, owner: str) -> str:
        """The numbers of the groups at a level that meet a condition, as rules list them. owner: as `condition` writes it."""
        if (level, owner) not in self._found:
            wanted = json.loads(owner)
            rule = PolicyRule("", "accept", (), tuple((key, Patterns(tuple(globs))) for key, globs in wanted.items()))
            found = (
                number
                for path, number in self.numbers.items()
                if _level(path) == level and (not wanted or rule.belongs(self._owner(path)))
            )
            self._found[level, owner] = ",".join(map(str, sorted(found, key=in_set)))
        return self._found[level, owner]

    def _owner(self, path: str) -> Mapping[str, str]:
        if path not in self._owners:
            self._owners[path] = Owner(0, 0, path).facts
        return self._owners[path]


def in_set(number: int) -> int:
    """The number of a group as sets compare it: its bytes are those of the host."""
    return int.from_bytes(_NUMBER.pack(number), "big")


def condition(owned_by: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A condition on the owner as a word of a rule: the patterns of each key. None at all holds for each known group."""
    return json.dumps({key: list(globs) for key, globs in owned_by}, separators=(",", ":"))


def _level(path: str) -> int:
    return min(len([part for part in path.split("/") if part]), DEEPEST + 1)
