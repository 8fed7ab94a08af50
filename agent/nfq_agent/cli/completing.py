"""Shell completion: the names of fields where a filter expects one, and of elements."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

# What precedes a field: nothing, a keyword or a parenthesis; then the typed part of its name.
_EXPECTED: Final = re.compile(r"(?P<before>(?:.*?(?:\b(?:and|or|not)\s+|\(\s*))?)(?P<name>\w*)", re.DOTALL | re.IGNORECASE)


def fields(incomplete: str) -> list[str]:
    """The typed filter, completed with each field that its last word may become."""
    from nfq_agent.flow_filter import FIELDS

    return offered(incomplete, FIELDS)


def element_names(incomplete: str) -> list[str]:
    """The built-in elements whose names begin so."""
    from nfq_agent.elements import PACKET_ELEMENTS, STREAM_ELEMENTS

    return [name for name in (*PACKET_ELEMENTS, *STREAM_ELEMENTS) if name.startswith(incomplete)]


def offered(incomplete: str, names: Iterable[str]) -> list[str]:
    """The same for these names."""
    found = _EXPECTED.fullmatch(incomplete)
    return [] if found is None else [found["before"] + name for name in names if name.startswith(found["name"])]
