"""What is wrong with the elements that a configuration uses: all of it, also where its other tables have faults."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from pydantic import ValidationError

from nfq_agent.config.lines import Place
from nfq_agent.config.lookups import HostLookups
from nfq_agent.config.models import Config
from nfq_agent.config.source import WITH_ELEMENTS, Source, tables_of
from nfq_agent.config.wording import model_faults
from nfq_agent.elements import ElementError


def element_faults(merged: Mapping[str, Any], source: Source, lookups: HostLookups) -> Iterator[str]:
    """One line for each fault of an element that a queue, a tap, an inline link or a proxy names. merged: as it was read."""
    tables = tables_of(merged, "element")
    config = Config().model_copy({"element": tables}).with_lookups(lookups)
    told: set[tuple[str, bool]] = set()
    for kind in WITH_ELEMENTS:
        for name, table in tables_of(merged, kind).items():
            elements = table.get("elements")
            for element in elements if isinstance(elements, list) else ():
                of_streams = kind == "proxy"
                if not isinstance(element, str) or (element, of_streams) in told:
                    continue
                told.add((element, of_streams))
                chain: Any = SimpleNamespace(elements=[element])
                try:
                    (config.stream_elements if of_streams else config.packet_elements)(chain)
                except ElementError as error:
                    yield from _faults(error, (kind, name, "elements"), source, tables)


def _faults(error: ElementError, at: Place, source: Source, tables: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    if isinstance(error.reason, ValidationError):
        yield from model_faults(source, error.reason, ("element", error.name), error.options)
        return
    if error.name in tables or any(table.get("type") == error.name for table in tables.values()):
        at = ("element", next((name for name, table in tables.items() if table.get("type", name) == error.name), error.name))
    text = str(error.reason)
    unknown, mark, allowed = text.partition("; allowed: ")
    # A table of this configuration is closer than a kind of element.
    if unknown.startswith(f"unknown element {error.name!r}") and (near := difflib.get_close_matches(error.name, tables, 1, 0.6)):
        text = f"unknown element {error.name!r} (did you mean {near[0]!r}?){mark}{allowed}"
    yield source.fault(at, text)
