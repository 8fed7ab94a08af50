"""What flows asked for, as rules that would accept them, and why each is proposed. No I/O, no clock.

Every number of things that is kept here is bounded, since `learn` may watch an agent for days.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from nfq_agent.protocols.known import HEADLINES

# Clients named in a comment, and clients kept for one; the most rules of one queue.
_SHOWN: Final = 3
_CLIENTS: Final = 64
MOST_RULES: Final = 20_000
# Units that exist once: a rule for one of them would never match again.
_PASSING: Final = re.compile(r"session-\d+\.scope|run-.*\.(scope|service)|.*@\d+-[\d-]+.*\.service")


@dataclass(frozen=True, slots=True)
class Wish:
    """What a rule accepts: a name (fact and value) or, without one, an address; on a port.

    owner: the condition on who has the socket, and its value; None for any owner. under: with all names under the value.
    """

    protocol: str
    fact: str
    value: str
    port: int | None
    owner: tuple[str, str] | None = None
    under: bool = False

    @property
    def table(self) -> dict[str, Any]:
        """The conditions of the rule."""
        found: dict[str, Any] = {} if self.owner is None else {self.owner[0]: literally(self.owner[1])}
        if self.fact:
            name = literally(self.value)
            found[self.fact] = [name, f"*.{name}"] if self.under else name
        else:
            number = re.fullmatch(r"proto-(\d+)", self.protocol)
            found["protocol"] = self.protocol if number is None else int(number[1])
            if self.value:
                found["dst"] = self.value
        if self.port is not None:
            found["dport"] = self.port
        return found


@dataclass(slots=True)
class Evidence:
    """Why a rule is proposed. first, last: seconds since the epoch. clients: some of them."""

    first: float
    last: float
    flows: int = 0
    clients: set[str] = field(default_factory=set)
    more: int = 0

    def add(self, first: float, last: float, client: str) -> None:
        """Count one flow."""
        self.first, self.last = min(self.first, first), max(self.last, last)
        self.flows += 1
        if len(self.clients) < _CLIENTS:
            self.clients.add(client)

    @property
    def comment(self) -> str:
        """As the comment above the rule."""
        clients = sorted(self.clients)
        most = len(clients) - _SHOWN
        more = "" if most <= 0 else f" and {most} more" if len(clients) < _CLIENTS else f" and at least {most} more"
        day = [time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each)) for each in (self.first, self.last)]
        return f"# {self.flows} flow{'s' * (self.flows != 1)}, {day[0]} to {day[1]}, from {', '.join(clients[:_SHOWN])}{more}"


class Learned:
    """The rules of one queue. grouped: the domain that a name is grouped under, empty for none; None keeps each name."""

    def __init__(self, grouped: Callable[[str], str] | None = None) -> None:
        self._grouped = grouped
        self._found: dict[Wish, Evidence] = {}
        self.left_out = 0
        """Flows without a rule, since there were too many rules."""

    def add(self, wishes: Mapping[Wish, float], last: float, client: str) -> None:
        """One flow. wishes: what it asked for, each with the time when it did first. last: when its last packet came."""
        for wish, first in best(wishes).items():
            kept = self._under_domain(wish)
            evidence = self._found.get(kept)
            if evidence is None:
                if len(self._found) >= MOST_RULES:
                    self.left_out += 1
                    continue
                evidence = self._found[kept] = Evidence(first, max(first, last))
            # They are from two clocks, and a flow may be as short as the difference.
            evidence.add(first, max(first, last), client)

    def _under_domain(self, wish: Wish) -> Wish:
        if self._grouped is None or not wish.fact:
            return wish
        domain = self._grouped(wish.value)
        return replace(wish, value=domain, under=True) if domain else wish

    def __len__(self) -> int:
        return len(self._found)

    @property
    def evidence(self) -> dict[Wish, Evidence]:
        """The rules, those with the most flows first."""
        return dict(sorted(self._found.items(), key=lambda item: -item[1].flows))


def wishes(ends: Mapping[str, Any], facts: Mapping[str, Any], owner: tuple[str, str] | None = None) -> Iterator[Wish]:
    """What a flow asks for. ends: as `nfq_agent.facts.ends` gives them."""
    port = ends.get("dport")
    if facts.get("protocol") == "dns":
        # The names in DNS questions say little; the policy is which resolver may be asked.
        yield Wish("dns", "", ends["dst"], port, owner)
        return
    for fact in HEADLINES:
        if value := facts.get(fact):
            for each in value if isinstance(value, tuple | list) else (value,):
                yield Wish("", fact, str(each), port, owner)
            return
    yield Wish(ends["proto"], "", ends["dst"], port, owner)


def best(found: Mapping[Wish, float]) -> Mapping[Wish, float]:
    """The names; the address only where no name came."""
    named = {wish: first for wish, first in found.items() if wish.fact or wish.protocol == "dns"}
    return named or found


def owner_of(record: Mapping[str, Any]) -> tuple[str, str] | None:
    """The condition on the owner of a flow; None where it is not known, or exists once."""
    for key in ("container", "unit"):
        if name := record.get(key):
            return None if key == "unit" and _PASSING.fullmatch(str(name)) else (key, str(name))
    return None


def literally(value: str) -> str:
    """A name as a pattern that matches nothing else: characters with a meaning in patterns are put into brackets."""
    return re.sub(r"[*?\[]", lambda match: f"[{match[0]}]", value)


def by_queue(names: Iterable[str], grouped: Callable[[str], str] | None) -> dict[str, Learned]:
    """Nothing learned yet, for each queue."""
    return {name: Learned(grouped) for name in names}
