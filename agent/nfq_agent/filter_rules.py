"""A filter as keys of policy rules (`when`): the rules that together match what it matches. No I/O, no clock."""

from __future__ import annotations

import itertools
import re
from typing import Any, Final

from nfq_agent.flow_filter import NAMES, NUMBERS, All, Comparison, Either, FilterError, FilterPart, parse
from nfq_agent.protocols.known import OWNERS

# Fields that a rule cannot ask for: the policy decides them, or they are known only afterwards.
_LATER: Final = frozenset(("verdict", "rule", "element", "reason", "packets", "bytes", "duration", "queue", "event"))
_EITHER: Final = {"name": NAMES, "host": ("src", "dst"), "port": ("sport", "dport")}
_SPECIAL: Final = re.compile(r"([*?\[])")
_PATTERNS: Final = frozenset(("unit", "container", "cgroup", "exe", "name", *OWNERS))
# Rules that one filter may come to.
MOST_RULES: Final = 64


def rule_tables(text: str) -> list[dict[str, Any]]:
    """The conditions of each rule, by the keys of a policy. Raises FilterError."""
    found = _alternatives(parse(text), text)
    if len(found) > MOST_RULES:
        raise FilterError(f"it comes to {len(found)} rules; allowed: {MOST_RULES}", text, 0)
    return found


def _alternatives(expression: FilterPart, text: str) -> list[dict[str, Any]]:
    match expression:
        case Comparison():
            return [{key: _values(expression, text)} for key in _EITHER.get(expression.field, (expression.field,))]
        case Either(parts):
            return [table for part in parts for table in _alternatives(part, text)]
        case All(parts):
            products = itertools.islice(itertools.product(*(_alternatives(part, text) for part in parts)), MOST_RULES + 1)
            return [_joined(tables, expression, text) for tables in products]
        case _:
            raise FilterError(
                "a rule of a policy cannot say `not`; allowed: a rule of its own before it", text, expression.position
            )


def _joined(tables: tuple[dict[str, Any], ...], whole: All, text: str) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for table in tables:
        if twice := joined.keys() & table.keys():
            raise FilterError(f"{min(twice)} is asked for twice; allowed: once, with several values", text, _position(whole))
        joined |= table
    return joined


def _position(expression: FilterPart) -> int:
    first = expression
    while not isinstance(first, Comparison) and hasattr(first, "parts") and first.parts:
        first = first.parts[-1]
    return getattr(first, "position", 0)


def _values(comparison: Comparison, text: str) -> list[Any]:
    field, operator = comparison.field, comparison.operator
    if field in _LATER:
        raise FilterError(f"{field} is not known before the policy decides", text, comparison.position)
    if operator not in ("=", "~"):
        raise FilterError(f"a rule of a policy takes = and ~, not {operator}", text, comparison.position)
    values = [value.text for value in comparison.values]
    if field in _PATTERNS:
        return values if operator == "~" else [_SPECIAL.sub(r"[\1]", value) for value in values]
    if operator == "~" and field != "interface":
        raise FilterError(f"{field} takes =", text, comparison.position)
    if field == "protocol" or field in NUMBERS:
        return [int(value) if value.isdecimal() else value for value in values]
    return values
