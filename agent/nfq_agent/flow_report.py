"""What an exporter says of a flow: what has passed of it in one period, and why the period ended. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from typing import Any, Final

from nfq_agent.facts import fields, headline
from nfq_agent.flow import Account

# What the record of a flow holds for the exporter alone, or that is said in another way.
_INSIDE: Final = frozenset(("kind", "first", "duration", "packets", "bytes"))


class PeriodEnd(IntEnum):
    """Why a period ended: flowEndReason, https://www.iana.org/assignments/ipfix (element 136)."""

    idle = 1
    active = 2
    ended = 3
    stopped = 4
    full = 5


@dataclass(frozen=True, slots=True)
class FlowReport:
    """start, end: seconds since the epoch. record: as the agent told it last. passed: in this period alone."""

    instance: str
    record: Mapping[str, Any]
    start: float
    end: float
    passed: Account
    why: PeriodEnd

    @property
    def name(self) -> str:
        """The name that the client showed; empty if none is known."""
        return headline({name: tuple(value) if isinstance(value, list) else value for name, value in self.record.items()})

    @property
    def point(self) -> str:
        """Where it was seen: `queue 7`, `tap web`, `inline web`."""
        return next((f"{kind} {self.record[kind]}" for kind in ("queue", "tap", "inline") if kind in self.record), "")

    def object(self) -> dict[str, Any]:
        """For JSON. The fields have the names that element `record` gives them."""
        facts = {name: value for name, value in self.record.items() if name not in _INSIDE}
        return {
            "event": "flow",
            "instance": self.instance,
            **fields(facts),
            "start": datetime.fromtimestamp(self.start, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "duration": round(self.end - self.start, 3),
            "pkts_toserver": self.passed.packets_sent,
            "bytes_toserver": self.passed.bytes_sent,
            "pkts_toclient": self.passed.packets_received,
            "bytes_toclient": self.passed.bytes_received,
            "end": self.why.name,
        }
