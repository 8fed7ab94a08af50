"""Where a configuration comes from: the file and the line of each key, so that a fault can be found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from nfq_agent.config.geo import Stamp
from nfq_agent.config.lines import BARE, Place, lines

# The kinds of tables that name elements.
WITH_ELEMENTS: Final = ("queue", "tap", "inline", "proxy")
_ESCAPED: Final = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


@dataclass(frozen=True, slots=True)
class Source:
    """Which file each key came from, by its path, the text of each file, and its version when it was read.

    The lines are only looked up for a fault: with thousands of ports that takes as long as reading the file.
    """

    main: Path
    origins: dict[Place, Path] = field(default_factory=dict)
    texts: dict[Path, str] = field(default_factory=dict)
    stamps: dict[Path, Stamp | None] = field(default_factory=dict)
    _lines: dict[Path, Mapping[Place, int]] = field(default_factory=dict)

    def file(self, location: Place) -> Path:
        """The file of a key, or of the table that it would be in."""
        for end in range(len(location), 0, -1):
            if (path := self.origins.get(location[:end])) is not None:
                return path
        return self.main

    def line(self, location: Place) -> int | None:
        """The line of a key, or of the table that it would be in; None where no file has it."""
        known = self._lines_of(self.file(location))
        return next((known[location[:end]] for end in range(len(location), 0, -1) if location[:end] in known), None)

    def _lines_of(self, file: Path) -> Mapping[Place, int]:
        if file not in self._lines:
            self._lines[file] = lines(self.texts.get(file, ""))
        return self._lines[file]

    def fault(self, location: Place, text: str, key: Place | None = None) -> str:
        """`FILE: KEY: what is wrong (line N); allowed: what is allowed`. key: what to name, if not the whole location."""
        what, mark, allowed = text.partition("; allowed: ")
        line = self.line(location)
        where = "" if line is None else f" (line {line})"
        return f"{self.file(location)}: {key_text(location if key is None else key)}: {what}{where}{mark}{allowed}"


def tables_of(merged: Mapping[str, Any], kind: str) -> dict[str, Mapping[str, Any]]:
    """The tables of a kind in what was read, by their names; what is no table is a fault that the check of the whole names."""
    found = merged.get(kind)
    return {name: table for name, table in found.items() if isinstance(table, Mapping)} if isinstance(found, Mapping) else {}


def key_as_written(key: str) -> str:
    """A key as a file has it: in quotes where it is not of letters, digits, hyphens and underscores."""
    if BARE.fullmatch(key):
        return key
    return '"' + "".join(_ESCAPED.get(each) or (each if each.isprintable() else f"\\u{ord(each):04x}") for each in key) + '"'


def key_text(location: Place) -> str:
    """A path as text: `element.allow.rule[2].dst`. Tables of an array count from 1, as the log counts rules."""
    text = ""
    for part in location:
        text += f"[{part + 1}]" if isinstance(part, int) else f".{key_as_written(part)}"
    return text.removeprefix(".") or "the file"
