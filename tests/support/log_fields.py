"""The fields of the log as the documentation has them, and the entries of a journal as they are read by it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from log_lines import SCHEMA, VALIDATOR

_DOCS: Final = Path(__file__).resolve().parents[2] / "docs"
_ROW: Final = re.compile(r"^\| (`.*?) \| (.*?) \|", re.MULTILINE)
# Of every line; in a journal they have names of its own.
COMMON: Final = frozenset(("time", "level", "message", "cut"))
_LEVELS: Final = {"3": "error", "4": "warning", "6": "info", "7": "debug"}


def _rows(page: str, begin: str, end: str) -> dict[str, str]:
    """The names in the first column of a table, each with the second column."""
    text = (_DOCS / page).read_text().partition(begin)[2].partition(end)[0]
    return {name: column for names, column in _ROW.findall(text) for name in re.findall(r"`(\w+)`", names)}


def documented() -> dict[str, str]:
    """The fields of records, of other lines, and the facts of `dpi`; of other lines with their types, `text` or `number`."""
    facts = _rows("dpi.md", "## The facts", "\n## ")
    return facts | _rows("elements.md", "### record", "\n### ") | _rows("elements.md", "## The fields of the log", "\n## ")


def types() -> dict[str, str]:
    """The types that the page names."""
    return _rows("elements.md", "## The fields of the log", "\n## ")


def fields_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry as the JSON line has it: each value by the type that the schema has. Raises ValueError where it has another."""
    found = {name.removeprefix("NFQ_").lower(): _typed(name, value) for name, value in entry.items() if name.startswith("NFQ_")}
    # The time is the journal's.
    line = {**found, "message": entry["MESSAGE"], "level": _LEVELS[entry["PRIORITY"]], "time": "2026-01-01T00:00:00Z"}
    VALIDATOR.validate(line)
    return found


def _typed(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        # journalctl has bytes that are no text as numbers, and a field that an entry has twice as a list.
        raise ValueError(f"{name}: {value!r} is not a text")  # a wrong value
    kind = SCHEMA["properties"].get(name.removeprefix("NFQ_").lower(), {}).get("type")
    if kind == "boolean":
        return {"true": True, "false": False}[value]
    return int(value) if kind == "integer" else float(value) if kind == "number" else value
