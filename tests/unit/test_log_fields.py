"""Each field that the source can put into the log is in the schema and on a page, with one type."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from log_fields import COMMON, documented, types
from log_lines import SCHEMA

from nfq_agent.elements.dpi import Dpi
from nfq_agent.log import LEVELS

PACKAGE = Path(__file__).resolve().parents[2] / "agent" / "nfq_agent"
# What takes a message and fields.
_LOGS = frozenset(("emit", "_emit", "log", "_log", "_limited", "limited", "_malformed", "_unsent", "_loops", "warn", "add"))
_ARGUMENTS = frozenset(("level", "now", "count"))
_KINDS = {"integer": "number", "number": "number", "string": "text", "boolean": "true or false"}


def logged() -> Iterator[tuple[str, str]]:
    """The names of fields in calls that log, each with where it is."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.is_relative_to(PACKAGE / "cli"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in _LOGS:
                for keyword in node.keywords:
                    if keyword.arg is not None:
                        yield keyword.arg, f"{path.relative_to(PACKAGE)}:{node.lineno}"
                    elif isinstance(keyword.value, ast.Dict):
                        literal = (key.value for key in keyword.value.keys if isinstance(key, ast.Constant))
                        yield from ((str(key), f"{path.relative_to(PACKAGE)}:{node.lineno}") for key in literal)


def test_each_field_of_a_call_that_logs_is_documented() -> None:
    found = [(name, where) for name, where in logged() if name not in _ARGUMENTS]
    assert {name for name, _ in found} >= {"event", "packet", "worker", "suppressed", "instance", "repairs", "lost"}
    assert not [(name, where) for name, where in found if name not in documented()]


def test_the_schema_has_the_fields_of_the_pages() -> None:
    assert SCHEMA["properties"].keys() - COMMON == documented().keys()
    assert not set(Dpi.keeps_facts) - documented().keys()
    assert set(SCHEMA["properties"]["level"]["enum"]) == set(LEVELS)


def test_the_page_has_the_types_of_the_schema() -> None:
    found = {name: _KINDS[SCHEMA["properties"][name]["type"]] for name in types()}
    assert found == types()
