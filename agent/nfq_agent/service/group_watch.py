"""Follows the control groups that rules name: a group that appears, or is made again, needs other rules (rules.groups)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from nfq_agent.host import cgroups
from nfq_agent.log import Log
from nfq_agent.rules.groups import Numbers, paths
from nfq_agent.rules.model import Ruleset

ADVICE: Final = "a slice that always has a running unit, or uid, has no such delay"


class GroupWatch:
    """late: seconds for which each group existed before its rules were in."""

    def __init__(
        self,
        log: Log,
        number: Callable[[str], int | None] = cgroups.number,
        age: Callable[[str], float] = cgroups.age,
    ) -> None:
        """number, age: of a group by its path, as in host.cgroups."""
        self.late: dict[str, float] = {}
        self._log = log
        self._number = number
        self._age = age
        self._known: dict[str, int | None] = {}
        self._looked = 0.0
        self._named: tuple[Ruleset | None, Mapping[str, Sequence[str]]] = None, {}

    def numbers(self, ruleset: Ruleset) -> Numbers:
        """Of all groups in these rules, now. What has changed since the last call is logged."""
        named = self._paths(ruleset)
        found = {path: self._number(path) for path in named}
        for path, number in found.items():
            if path not in self._known:
                if number is None:
                    self._log(f"{cgroups.absence(path)}{_waiting(named[path])}", "warning")
            elif number is None and self._known[path] is not None:
                self._log(f"the control group {path} is gone{_waiting(named[path])}")
        self._known |= found
        return found

    def last_numbers(self, ruleset: Ruleset) -> Numbers:
        """Of all groups in these rules, as they were at the last call of `numbers`."""
        return self._known if self._paths(ruleset).keys() <= self._known.keys() else self.numbers(ruleset)

    def changed(self, ruleset: Ruleset) -> bool:
        """Whether a group in these rules has appeared, was made again, or is gone."""
        return any(self._number(path) != self._known.get(path) for path in self._paths(ruleset))

    def looked(self, now: float) -> None:
        """No group had changed at this time. now: seconds since any fixed moment."""
        self._looked = now

    def followed(self, ruleset: Ruleset, before: Numbers, now: float) -> None:
        """Rules for new groups are in. before: what `known` was. now: as in `looked`."""
        for path, names in self._paths(ruleset).items():
            if self._known[path] in (None, before.get(path)):
                continue
            # The kernel may not know the group's age; it was not there at the look before.
            late = min(self._age(path), now - self._looked)
            what = "was made again, as when its unit starts again" if before.get(path) is not None else "exists now"
            if names:
                self.late[path] = self.late.get(path, 0.0) + late
                self._log(
                    f"the control group {path} {what}: {_listed(names)} in for it, {late:.2f} s after the group; what "
                    f"its sockets sent until then passed uninspected ({ADVICE})"
                )
            else:
                self._log(f"the control group {path} {what}: the rules that exclude it are in")

    @property
    def known(self) -> Numbers:
        """The numbers at the last call of `numbers`."""
        return dict(self._known)

    def waiting(self, ruleset: Ruleset) -> tuple[str, ...]:
        """A line for each group that does not exist, and whose rules are not in."""
        named = self._paths(ruleset)
        return tuple(
            f"the control group {path} does not exist{_waiting(names)}"
            for path, names in named.items()
            if names and self._known.get(path) is None
        )

    def _paths(self, ruleset: Ruleset) -> Mapping[str, Sequence[str]]:
        # There may be thousands of rules, and this is asked four times a second.
        if self._named[0] is not ruleset:
            self._named = ruleset, paths(ruleset)
        return self._named[1]


def _listed(names: Sequence[str]) -> str:
    return f"{'rules' if len(names) > 1 else 'rule'} {', '.join(names)} {'are' if len(names) > 1 else 'is'}"


def _waiting(names: Sequence[str]) -> str:
    if not names:
        return ""
    one = len(names) == 1
    return f"; {'rule' if one else 'rules'} {', '.join(names)} {'waits' if one else 'wait'} for it"
