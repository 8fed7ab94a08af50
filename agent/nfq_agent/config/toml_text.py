"""The bytes of a TOML file as text and as a table; what is wrong with them is said with its line."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from nfq_agent.config.lines import Place, lines
from nfq_agent.config.models import ConfigError
from nfq_agent.config.source import key_text

# Levels of tables and lists within each other. A configuration has five.
_DEEPEST: Final = 50
# TOML 1.0: numbers of 64 bits with a sign.
_BITS: Final = 63
# Digits from which Python makes no number (sys.set_int_max_str_digits), with some room.
_MANY_DIGITS: Final = re.compile(rb"[0-9_]{4000,}")
# The path of a table, as Python writes it.
_PATH: Final = re.compile(r"\('[^()]*\)")
_PARTS: Final = re.compile(r"'([^']*)'")


def read_toml(path: Path, data: bytes) -> tuple[str, dict[str, Any]]:
    """The text and its table. Raises ConfigError."""
    try:
        # Some editors begin a file with a mark of its encoding.
        text = data.decode("utf-8-sig")
        table = tomllib.loads(text)
        large = list(_large_numbers(table))
    except (ValueError, RecursionError) as error:
        raise ConfigError([f"{path}: not TOML: {_fault(error, data)}"]) from error
    if large:
        at = lines(text)
        raise ConfigError(
            [
                f"{path}: {key_text(place)}: a number is too large (line {at.get(place, 1)}); allowed: whole numbers of 64 bits"
                for place in large
            ]
        )
    return text, table


def _large_numbers(value: dict[str, Any] | list[Any], at: Place = ()) -> Iterator[Place]:
    """Where whole numbers of more than 64 bits are. Raises RecursionError where tables and lists are nested too deeply."""
    if len(at) > _DEEPEST:
        raise RecursionError
    for key, each in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(each, dict | list):
            yield from _large_numbers(each, (*at, key))
        elif isinstance(each, int) and each.bit_length() > _BITS:
            yield (*at, key)


def _fault(error: Exception, data: bytes) -> str:
    """What is wrong, where, and what is allowed. error: of the decoder, of tomllib, or of Python."""
    if isinstance(error, UnicodeDecodeError):
        line = data.count(b"\n", 0, error.start) + 1
        return f"byte {data[error.start]:#04x} is not UTF-8 (at line {line}); allowed: text in UTF-8"
    if isinstance(error, RecursionError):
        return f"tables or lists are nested too deeply; allowed: at most {_DEEPEST} levels"
    if not isinstance(error, tomllib.TOMLDecodeError):
        digits = _MANY_DIGITS.search(data)
        line = data.count(b"\n", 0, digits.start() if digits else 0) + 1
        return f"a number is too large (at line {line}); allowed: whole numbers of 64 bits"
    end = f"(at line {len(data.splitlines()) or 1}, the end of the file)"
    text = _PATH.sub(lambda found: f"[{'.'.join(_PARTS.findall(found[0]))}]", str(error))
    return f"{text.replace('(at end of document)', end)}; allowed: TOML 1.0"
