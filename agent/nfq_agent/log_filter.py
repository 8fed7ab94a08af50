"""Which lines of the log are written: `[log] when`, a filter for the lines about flows. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from nfq_agent.decisions import element_and_rule
from nfq_agent.flow_filter import parse

_INWARD: Final = frozenset(("PREROUTING", "INPUT"))
_OUTWARD: Final = frozenset(("OUTPUT", "POSTROUTING"))


def shows(when: str) -> Callable[[Mapping[str, Any]], bool] | None:
    """Takes the fields of an event, and says whether its line is written; None where every line is. Raises FilterError.

    A line that is not about a flow, as a repair of the rules, is always written.
    """
    if not when.strip():
        return None
    part = parse(when)
    return lambda fields: "src" not in fields or part.match(_record(fields))


def _record(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of an event as the filter asks for them."""
    record = dict(fields)
    element, rule = element_and_rule(str(fields.get("reason", "")))
    if element:
        record.setdefault("element", element)
    if rule:
        record.setdefault("rule", rule)
    if "dns_name" in fields:
        record["dns_name"] = str(fields["dns_name"]).split()
    if interfaces := [str(fields[key]) for key in ("indev", "outdev") if key in fields]:
        record["interface"] = interfaces
    hook = str(fields.get("hook", ""))
    if hook in _INWARD or hook in _OUTWARD:
        record["direction"] = "in" if hook in _INWARD else "out"
    return record
