"""The lines that an agent writes with LOG_FORMAT=json, and the schema that they fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from jsonschema import Draft202012Validator  # type: ignore[import-untyped]  # it ships no types

SCHEMA: Final = json.loads((Path(__file__).resolve().parents[2] / "docs/record.schema.json").read_text())
VALIDATOR: Final = Draft202012Validator(SCHEMA, format_checker=Draft202012Validator.FORMAT_CHECKER)


def lines(log: str) -> list[dict[str, Any]]:
    """Each line of a log; it fits the schema. The last one may be half written, and is left out then."""
    found: list[dict[str, Any]] = [json.loads(line) for line in log.splitlines(keepends=True) if line.endswith("\n")]
    for line in found:
        VALIDATOR.validate(line)
    return found
