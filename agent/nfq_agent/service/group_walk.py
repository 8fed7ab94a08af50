"""Follows all control groups of the host, for the rules that a policy by owner is compiled to (rules.owner_policy)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Final

from nfq_agent.host import cgroups
from nfq_agent.host.time_share import TimeShare
from nfq_agent.rules.group_tree import GroupTree
from nfq_agent.rules.groups import needs_tree
from nfq_agent.rules.model import Ruleset

# Seconds from one walk to the next, and the share of the time that walks may take, with this many seconds at once. What a group
# sends that is not known yet goes to the queue.
_PAUSE: Final = 1.0
_SHARE: Final = 0.01
_AT_ONCE: Final = 0.5


class GroupWalk:
    """known: the groups that the rules were made for; none while no rule asks for them."""

    def __init__(
        self, groups: Callable[[], Iterable[tuple[int, str]]] = cgroups.all_groups, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """groups: number and path of each. clock: seconds since any fixed moment."""
        self.known = GroupTree()
        self._groups = groups
        self._clock = clock
        self._walks = TimeShare(_SHARE, _AT_ONCE, clock)
        self._next = 0.0
        self._needed: tuple[Ruleset | None, bool] = None, False

    def needed(self, ruleset: Ruleset) -> bool:
        """Whether a rule asks for them."""
        # It is asked four times a second.
        if self._needed[0] is not ruleset:
            self._needed = ruleset, needs_tree(ruleset)
        return self._needed[1]

    def now(self, ruleset: Ruleset) -> GroupTree:
        """The groups that exist now; none where no rule of these asks for them."""
        if not self.needed(ruleset):
            return GroupTree()
        with self._walks.taken():
            found = GroupTree(self._groups())
        self._next = self._clock() + _PAUSE
        return found

    def changed(self, ruleset: Ruleset) -> GroupTree | None:
        """The groups that exist now, where that are others than the known ones and it is time to look; else None."""
        if not self.needed(ruleset) or self._clock() < self._next or not self._walks.allows():
            return None
        found = self.now(ruleset)
        return None if found == self.known else found
