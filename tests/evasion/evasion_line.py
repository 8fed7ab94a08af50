"""One line of the table of evasions: what is tried, who can, and what happens to it."""

from __future__ import annotations

from dataclasses import dataclass

from evasion_bed import How

ANY_USER = "any user of the host"
RAW = "raw sockets (root, CAP_NET_RAW) or another host"


@dataclass(frozen=True)
class Line:
    """One evasion.

    name: short, for the test's id. text: what is done, for the page. how: does it; it is given the name to smuggle. raw: it
    needs raw sockets. twin: the same bytes with allowed names alone are honest, and have to arrive. limit: why it is not
    blocked, None where it is. holds: kinds of policy that block it all the same. still_open: an issue that is to block it.
    """

    name: str
    text: str
    how: How
    raw: bool = False
    twin: bool = False
    limit: str | None = None
    holds: tuple[str, ...] = ()
    still_open: str = ""

    @property
    def who(self) -> str:
        """Who can do it."""
        return RAW if self.raw else ANY_USER
