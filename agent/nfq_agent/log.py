"""Events and how they are written: for a console, as JSON, or for the journal. Rendering only; host/journal.py writes."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

# syslog(3) priorities, as the journal uses them.
LEVELS: Final[Mapping[str, int]] = {"debug": 7, "info": 6, "warning": 4, "error": 3}
_COLOURS: Final = {"debug": "\x1b[2m", "info": "", "warning": "\x1b[33m", "error": "\x1b[31m"}
# The length to which a text is shortened at most.
_SHORT: Final = 64
# What a JSON line keeps when it is shortened to the least.
_LEAST: Final = frozenset(("time", "level", "message", "cut"))
IDENTIFIER: Final = "nfq-agent"


@dataclass(frozen=True, slots=True)
class LogEvent:
    """One thing that happened. time: seconds since the epoch. fields: by names in small letters (`src`, `dport`)."""

    level: str
    message: str
    time: float
    fields: Mapping[str, Any] = field(default_factory=dict)


def console(event: LogEvent, colour: bool = False) -> bytes:
    """One line for a console."""
    stamp = datetime.fromtimestamp(event.time).strftime("%H:%M:%S.%f")[:-3]
    line = f"{stamp} {event.level:<7} {_one_line(event.message)}"
    if colour and _COLOURS[event.level]:
        line = f"{_COLOURS[event.level]}{line}\x1b[0m"
    return line.encode(errors="replace") + b"\n"


def as_json(event: LogEvent, most: int | None = None) -> bytes:
    """One JSON object on a line; the fields stand beside `time`, `level` and `message`.

    most: bytes that the line may have. The longest texts are shortened until it fits, which `cut` then says.
    """
    stamp = datetime.fromtimestamp(event.time, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    record = {**event.fields, "time": stamp, "level": event.level, "message": event.message}
    line = _json_line(record)
    while most is not None and len(line) > most:
        longest = max(record, key=lambda name: len(_json(record[name])))
        if len(text := str(record[longest])) < _SHORT and record.keys() - _LEAST:
            # Very many short fields: the most important ones stay.
            record = {"time": stamp, "level": event.level, "message": event.message}
        else:
            record[longest] = text[: len(text) // 2]
        record["cut"] = True
        line = _json_line(record)
    return line


def _json_line(record: Mapping[str, Any]) -> bytes:
    return f"{{{', '.join(f'{_json(str(name))}: {_json(value)}' for name, value in record.items())}}}\n".encode()


def _json(value: object) -> str:
    """As JSON, in ASCII; what JSON has no form for, as text: a field of an element may be anything."""
    try:
        return json.dumps(value, default=str, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        # NaN and infinity, keys that are not names, an object that contains itself.
        return json.dumps(ascii(value))


def journal(event: LogEvent) -> bytes:
    """A datagram of the journal's native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL); fields become `NFQ_...`."""
    entries = [("MESSAGE", event.message), ("PRIORITY", str(LEVELS[event.level])), ("SYSLOG_IDENTIFIER", IDENTIFIER)]
    entries += [(f"NFQ_{name.upper()}", _text(value)) for name, value in event.fields.items() if value is not None]
    return b"".join(_entry(name.encode(), value.encode(errors="replace")) for name, value in entries)


def _text(value: Any) -> str:
    """As in JSON, but for the quotation marks of a text."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _entry(name: bytes, value: bytes) -> bytes:
    if b"\n" in value:
        return name + b"\n" + struct.pack("<Q", len(value)) + value + b"\n"
    return name + b"=" + value + b"\n"


def _one_line(text: str) -> str:
    """Control characters from the network must not control a terminal."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


class Log:
    """Writes events to a sink, from a level on. An event that the sink cannot take at once is lost and counted."""

    def __init__(
        self,
        write: Callable[[LogEvent], bool],
        level: str,
        clock: Callable[[], float],
        shows: Callable[[Mapping[str, Any]], bool] | None = None,
    ) -> None:
        """shows: says by its fields whether an event is written; it is not asked about warnings and errors."""
        self._write = write
        self._shows = shows
        self._threshold = LEVELS[level]
        self._clock = clock
        self.lost = 0

    def become(self, other: Log) -> Log:
        """Use the sink and the level of `other` from now on. Returns a log with the previous ones."""
        before = Log(self._write, "info", self._clock, self._shows)
        before._threshold = self._threshold
        self._write, self._threshold, self._shows = other._write, other._threshold, other._shows
        return before

    def __call__(self, message: str, level: str = "info", **fields: Any) -> None:
        """Write one event; never blocks."""
        if LEVELS[level] > self._threshold:
            return
        if self._shows is not None and LEVELS[level] >= LEVELS["info"] and not self._shows(fields):
            return
        if self.lost and self._write(
            LogEvent("warning", f"{self.lost} log lines were lost: the log did not accept them", self._clock())
        ):
            self.lost = 0
        if not self._write(LogEvent(level, message, self._clock(), fields)):
            self.lost += 1
