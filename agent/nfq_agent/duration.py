"""Durations as a configuration has them: `5s`, `100ms`, `0`. In seconds once read."""

from __future__ import annotations

import re
from typing import Annotated, Final

from pydantic import BeforeValidator

_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s|m|h)")
_SECONDS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def _duration(value: object) -> float:
    if isinstance(value, str):
        if value == "0":
            return 0.0
        if match := _DURATION.fullmatch(value):
            return float(match[1]) * _SECONDS[match[2]]
    raise ValueError('not a duration; allowed: "0", or a number with us, ms, s, m or h, as in "5s"')


Duration = Annotated[float, BeforeValidator(_duration)]
