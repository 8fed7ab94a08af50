"""Sizes as a configuration has them: `64MB`, `100kB`, a number of bytes. In bytes once read."""

from __future__ import annotations

import re
from typing import Annotated, Final

from pydantic import BeforeValidator

_SIZE: Final = re.compile(r"(\d+)\s?(kB|MB|GB)")
_UNITS: Final = {"kB": 1000, "MB": 1000_000, "GB": 1000_000_000}


def _size(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)) and int(match[1]) > 0:
        return int(match[1]) * _UNITS[match[2]]
    raise ValueError(f'{value!r} is no size; allowed: a number of bytes, or a number with kB, MB or GB, as in "64MB"')


Size = Annotated[int, BeforeValidator(_size)]
