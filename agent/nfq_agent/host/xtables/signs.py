"""A cheap sign of the rules of an instance in legacy tables: it shows whether they changed, not what they are."""

from __future__ import annotations

import os
from struct import Struct
from typing import Final

from nfq_agent.host.families import ADDRESS_FAMILIES
from nfq_agent.host.xtables.image import Entry, Image, version
from nfq_agent.host.xtables.in_front import LAYOUTS
from nfq_agent.rules.model import Family, own_chains, tag_prefix

# struct xt_standard_target: header, verdict, padding.
_HEADER: Final = 32
_SHORT: Final = Struct("=H")

Sign = tuple[tuple[bytes, bytes], ...]


class Signs:
    """Of one instance. A table is read again when its size or its number of rules has changed since."""

    def __init__(self, instance: str) -> None:
        self._chains = frozenset(map(os.fsencode, own_chains(instance)))
        self._tag = tag_prefix(instance).encode()
        self._known: dict[tuple[Family, str], tuple[tuple[int, ...], Sign]] = {}

    def of(self, family: Family, table: str) -> Sign:
        """Every rule of ours in the table, without its counters and the places of chains. Raises OSError."""
        now = version(ADDRESS_FAMILIES[family], table)
        known = self._known.get((family, table))
        if known is None or known[0] != now:
            image = Image(ADDRESS_FAMILIES[family], table)
            entries = image.entries(self._chains, self._tag)
            known = image.version, tuple((each.chain, _without_counters(family, each)) for each in entries)
            self._known[family, table] = known
        return known[1]


def _without_counters(family: Family, entry: Entry) -> bytes:
    layout = LAYOUTS[family]
    # The matches begin behind the counters.
    first, end = layout.counters, layout.matches
    data = entry.data
    if entry.jump is None:
        return data[:first] + data[end:]
    # The place of a chain in the table changes with foreign rules; its name does not.
    target = _SHORT.unpack_from(data, layout.target)[0] + _HEADER
    return data[:first] + data[end:target] + entry.jump
