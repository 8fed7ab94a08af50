"""Asks the running agent for records of flows or of traced packets, and puts a record into words."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from typing import Any, Final

import typer

from nfq_agent.cli import show
from nfq_agent.flow_filter import FilterError, FilterPart, parse
from nfq_agent.service import control
from nfq_agent.values import duration

# Seconds between two questions.
EVERY: Final = 0.5
# For how many seconds an agent that has answered before may be away, as in a restart or an upgrade.
AWAY: Final = 10.0
_SELF: Final = "nfq-agent: "
_FIRST: Final = "the agent judges packets first, and reports what it has time for"


def seconds_of(text: str, option: str = "--for") -> float:
    """`60`, `60s` or `5m` in seconds; an empty text has no end. Raises typer.BadParameter for the option."""
    try:
        return math.inf if not text else float(text) if text.isdecimal() else duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=f"'{option}'") from error


def read_filter(text: str) -> FilterPart | None:
    """The filter of the command line; None if it is wrong, which is printed."""
    try:
        return parse(text)
    except FilterError as error:
        say_wrong(error)
        return None


def say_wrong(error: FilterError) -> None:
    """Print a filter that is wrong, and the fault with a mark below its character: both begin in the same column."""
    for line, before in zip(error.pointed.split("\n"), (_SELF, " " * len(_SELF)), strict=True):
        print(f"{before}{line}", file=sys.stderr)


class Questions:
    """One client of the agent. packets: the filter of packets that are traced, None for flows.

    missed: records so far. unshown: flows that pass and are not reported, at the last question. unlooked: packets that were not
    looked at for any trace. away: why there is no answer at the moment; empty while there is one.
    """

    def __init__(self, instance: str, packets: str | None) -> None:
        self._instance = instance
        self._packets = packets
        self._places: dict[str, Any] = {}
        self._unlooked: int | None = None
        self.missed = self.unshown = self.unlooked = 0
        self.away = ""
        self._answered = False
        self._away_since: float | None = None

    def ask(self, timeout: float = 30.0) -> list[dict[str, Any]]:
        """The records since the last question. Raises ControlError, also if there is no answer within `timeout` seconds."""
        said = control.ask(self._instance, {"verb": "flows", "places": self._places, "packets": self._packets}, timeout)
        if not said.get("ok"):
            raise control.ControlError(str(said.get("message")))
        self._places = said["places"]
        self.missed += int(said["missed"])
        # An older agent does not know these.
        self.unshown = int(said.get("unshown", 0))
        unlooked = int(said.get("unlooked", 0))
        self.unlooked += 0 if self._unlooked is None else max(0, unlooked - self._unlooked)
        self._unlooked = unlooked
        self._answered, self._away_since, self.away = True, None, ""
        records: list[dict[str, Any]] = said["records"]
        return records

    def ask_again(self) -> list[dict[str, Any]]:
        """The same; none from an agent that has answered before and is away for up to AWAY seconds. Raises ControlError."""
        try:
            return self.ask()
        except control.ControlError as error:
            now = time.monotonic()
            self._away_since = now if self._away_since is None else self._away_since
            if not self._answered or now - self._away_since > AWAY:
                raise
            self.away = f"{error}; it is asked again for {AWAY:g} s"
            return []

    def ask_at_the_end(self) -> list[dict[str, Any]]:
        """The same; an agent that is away is waited for. Raises ControlError."""
        while True:
            found = self.ask_again()
            if not self.away:
                return found
            time.sleep(EVERY)

    def each(self, seconds: float) -> Iterator[list[dict[str, Any]]]:
        """The records of each half second, for `seconds`, and of the rest of that time. Raises ControlError."""
        ends = time.monotonic() + seconds
        while (now := time.monotonic()) < ends:
            before = self.away
            yield self.ask_again()
            if self.away and not before:
                show.error(f"{_SELF}{self.away}")
            time.sleep(max(0.0, min(EVERY, ends - now)))
        yield self.ask_at_the_end()

    def say_missed(self) -> None:
        """Print on standard error what is not shown, if anything."""
        if self.missed:
            show.error(f"{self.missed} records were missed: more came than this terminal was told")
        if self.unlooked:
            show.error(f"{self.unlooked} packets were not looked at: {_FIRST}")
        if self.unshown and self._packets is None:
            show.error(f"{self.unshown_flows}: {_FIRST}")

    @property
    def unshown_flows(self) -> str:
        """`12 flows not shown`."""
        return f"{self.unshown} flow{'s' * (self.unshown != 1)} not shown"


def printable(text: object) -> str:
    """A text without control characters: names come from traffic, and some of these control a terminal."""
    return "".join(char if char.isprintable() else "?" for char in str(text))


def verdict_of(record: dict[str, Any]) -> str:
    """The verdict, `would drop` in monitor mode, or `-` where it is not known."""
    return "would drop" if record.get("would") else str(record.get("verdict", "-"))


def who_of(record: dict[str, Any]) -> str:
    """Container or unit, or nothing."""
    return printable(record.get("container") or record.get("unit") or "")


def names_of(record: dict[str, Any]) -> str:
    """The names that the client showed, or nothing."""
    names = record.get("tls_sni") or record.get("http_host") or record.get("dns_name") or ""
    return printable(names if isinstance(names, str) else " ".join(map(str, names)))


def protocol_and_names(record: dict[str, Any]) -> str:
    """`tls www.example.org`, `udp`."""
    return f"{printable(record.get('protocol') or record.get('proto') or '')} {names_of(record)}".strip()


def end_of(record: dict[str, Any], address: str, port: str) -> str:
    """One end of a flow: `192.0.2.7:443`, `[2001:db8::1]:443`, or the address alone."""
    if port not in record:
        return str(record[address])
    host = str(record[address])
    return f"[{host}]:{record[port]}" if ":" in host else f"{host}:{record[port]}"
