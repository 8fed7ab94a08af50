"""The country and the autonomous system of an address, as a database says. Pure; config/geo.py reads the files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, runtime_checkable

_COUNTRY: Final = re.compile(r"[A-Z]{2}")
_LAST_ASN: Final = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """country: the code of ISO 3166-1, in capitals. asn: the number of the autonomous system. None where it is not known."""

    country: str | None = None
    asn: int | None = None


NOWHERE: Final = Whereabouts()


@runtime_checkable
class Geography(Protocol):
    """Returns the place of an address."""

    def whereabouts(self, address: bytes) -> Whereabouts:
        """The place of a packed address of 4 or 16 bytes; NOWHERE if no database has it."""
        ...


def country(value: object) -> str:
    """The code of a country. Raises ValueError."""
    if isinstance(value, str) and _COUNTRY.fullmatch(value.upper()):
        return value.upper()
    raise ValueError(f'{value!r} is not a code of a country; allowed: two letters of ISO 3166-1, as in "DE"')


def asn(value: object) -> int:
    """The number of an autonomous system. Raises ValueError."""
    text = value.upper().removeprefix("AS") if isinstance(value, str) else ""
    number = int(text) if text.isascii() and text.isdecimal() else value
    if isinstance(number, int) and not isinstance(number, bool) and 1 <= number <= _LAST_ASN:
        return number
    raise ValueError(f'{value!r} is not an autonomous system; allowed: 1 to {_LAST_ASN}, or "AS64496"')


def place(record: object) -> Whereabouts:
    """The place in a record of a database, in the forms of MaxMind, DB-IP and IPinfo."""
    if not isinstance(record, Mapping):
        return NOWHERE
    named = record.get("country", record.get("country_code"))
    return Whereabouts(
        _known(country, named.get("iso_code") if isinstance(named, Mapping) else named), _known(asn, _number(record))
    )


def _number(record: Mapping[str, Any]) -> object:
    return record.get("autonomous_system_number", record.get("asn"))


def _known(parse: Any, value: object) -> Any:
    try:
        return parse(value)
    except ValueError:
        return None
