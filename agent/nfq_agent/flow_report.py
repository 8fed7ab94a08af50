"""What an exporter reports about a flow: what has passed of it in one period, and why the period ended. Values only."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from ipaddress import ip_address
from typing import Any, Final

from nfq_agent.facts import fields, headline
from nfq_agent.flow import Account
from nfq_agent.packet import PROTOCOL_NAMES

# Fields of a flow's record that only the exporter needs, or that its report has in another form.
_INSIDE: Final = frozenset(("kind", "first", "duration", "packets", "bytes"))


# The fields that identify a flow of an agent in its records.
FLOW_KEY: Final = ("queue", "tap", "inline", "proto", "src", "sport", "dst", "dport")
# The fields for how much of a flow has passed.
FIGURES: Final = ("pkts_toserver", "bytes_toserver", "pkts_toclient", "bytes_toclient")
_PROTOCOLS: Final = frozenset(PROTOCOL_NAMES.values())
# Longer than any uptime or duration; a number of seconds that a date can still hold.
_LATEST: Final = 1 << 32


def check(record: Mapping[str, Any]) -> None:
    """Raise ValueError, KeyError or TypeError if a report of this record could not be written.

    A worker that was taken over can write any JSON object.
    """
    if ip_address(_text(record["src"])).version != ip_address(_text(record["dst"])).version:
        raise ValueError("the addresses are of two versions")
    proto = _text(record["proto"])
    if proto not in _PROTOCOLS and not re.fullmatch(r"proto-[0-9]{1,3}", proto):
        raise ValueError(f"{proto!r} is not a protocol")
    for port in ("sport", "dport"):
        _within(record.get(port, 0), 1 << 16)
    for name in FIGURES:
        _within(record[name], 1 << 64)
    for name in ("first", "duration"):
        if not math.isfinite(record[name]) or not 0 <= record[name] < _LATEST:
            raise ValueError(f"{name} is not a number of seconds")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value


def _within(value: Any, end: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < end:
        raise ValueError(f"{value!r} is not a number from 0 to {end - 1}")


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
