"""One line of the table of evasions: what is tried, who can, and what happens to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from evasion_attempt import Attempt, How
from evasion_bed import Bed

ANY_USER = "any user of the host"
RAW = "raw sockets (root, CAP_NET_RAW) or another host"
ROOT = "root"
# Lines that are tried by themselves, behind all others, and in this order.
PHASES = ("together", "event", "flood")


@dataclass(frozen=True)
class Line:
    """One evasion.

    name: short, for the test's id. text: what is done, for the page. how: does it; it is given the name to smuggle. raw: it
    needs raw sockets, or root. by: who can do it, if that does not follow from `raw`. twin: the same with allowed names alone is
    honest, and has to arrive. limit: why it is not blocked, None where it is. holds: kinds of policy that block it all the
    same. good, bad: domains of its names. measured: looks at what else came of it, for every policy, and fails; `outcome` is then
    what the page says. arrives: without an agent the servers understand the name. phase: when it is tried.
    """

    name: str
    text: str
    how: How
    raw: bool = False
    by: str = ""
    twin: bool = False
    limit: str | None = None
    holds: tuple[str, ...] = ()
    good: str = "allowed.test"
    bad: str = "refused.test"
    measured: Callable[[Bed, Attempt], None] | None = None
    outcome: str = "blocked"
    arrives: bool = True
    phase: str = "together"

    @property
    def who(self) -> str:
        """Who can do it."""
        return self.by or (RAW if self.raw else ANY_USER)
