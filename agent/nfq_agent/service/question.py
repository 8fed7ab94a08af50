"""A client's question on the control socket: one JSON object on a line, every value checked before the supervisor sees it.

A value of the wrong type must end in a refusal: raised inside the supervisor it would end the agent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

# A place in a ring is bytes, records and records left out (flow_ring.RingPlace): numbers of 64 bits.
_NUMBERS_OF_A_PLACE: Final = 3
_MOST: Final = 1 << 64


def parse(line: bytes) -> dict[str, Any]:
    """The question. Raises ValueError, which names the value and what is allowed."""
    question = json_object(line)
    for name, (fits, allowed) in _VALUES.items():
        if name in question and not fits(question[name]):
            raise ValueError(f"{name} = {_shown(question[name])}; allowed: {allowed}")
    if "verb" not in question:
        raise ValueError("it has no verb")
    return question


def json_object(line: bytes) -> dict[str, Any]:
    """The JSON object on a line. Raises ValueError."""
    try:
        value = json.loads(line)
    except RecursionError as error:
        raise ValueError("the nesting is too deep") from error
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value


def _shown(value: object) -> str:
    try:
        text = json.dumps(value)
    except RecursionError:
        return "too deep a nesting"
    return text if len(text) <= 60 else f"{text[:60]}..."


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_seconds(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _DAY


def _are_places(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_place, value.values()))


def _is_place(value: object) -> bool:
    return isinstance(value, list) and len(value) == _NUMBERS_OF_A_PLACE and all(map(_is_number, value))


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST


def _or_none(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or fits(value)


# How long an agent takes something back by itself: a day at most.
_DAY: Final = 86400
_SECONDS: Final = f"a number of seconds above 0, up to {_DAY}"
# Every key that any verb reads, with its check and what it allows.
_VALUES: Final[Mapping[str, tuple[Callable[[object], bool], str]]] = {
    "verb": (_is_text, "a text"),
    "confirm": (_or_none(_is_seconds), f"{_SECONDS}, or null"),
    "keep": (lambda value: isinstance(value, bool), "true or false"),
    "faults": (lambda value: isinstance(value, bool), "true or false"),
    "trial": (_or_none(_is_number), "the number of a trial, or null"),
    "queue": (_is_text, "the name of a queue"),
    "odds": (lambda value: isinstance(value, dict), "an object with the faults"),
    "seconds": (_is_seconds, _SECONDS),
    "places": (_or_none(_are_places), "an object with three numbers for each worker, or null"),
    "packets": (_or_none(_is_text), "a filter, or null"),
}
