"""The line of each key and array member of a TOML text; tomllib gives only the values.

The text must be valid TOML: for any other text the result is undefined.
"""

from __future__ import annotations

import contextlib
import re
import tomllib
from typing import Final

Place = tuple[str | int, ...]

_SPACE: Final = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
# A key without quotes.
BARE: Final = re.compile(r"[A-Za-z0-9_-]+")
# The closing quotes of a multi-line string may follow one or two quotes that belong to it.
_STRING: Final = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}(?!")' r"|'''.*?'{3,5}(?!')" r'|"(?:[^"\\\n]|\\.)*"' r"|'[^'\n]*'", re.DOTALL
)
_SCALAR: Final = re.compile(r"[^,\]}#\n]+")


def lines(text: str) -> dict[Place, int]:
    """The line, from 1 on, of each table, key and array member by its path; places in an array count from 0."""
    return _Reader(text).read()


def _unquoted(key: str) -> str:
    """A key in quotes as tomllib gives it."""
    if "\\" in key and key[0] == '"':
        with contextlib.suppress(tomllib.TOMLDecodeError):
            return str(tomllib.loads(f"key = {key}")["key"])
    return key[1:-1]


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._line = 1
        self._counted = 0
        self._found: dict[Place, int] = {}
        # How many tables each array of tables has so far.
        self._tables: dict[Place, int] = {}

    def read(self) -> dict[Place, int]:
        """All of the text."""
        prefix: Place = ()
        while self._next():
            if self._text.startswith("[[", self._at):
                self._at += 2
                array = self._resolved(self._key())
                place = self._tables.get(array, -1) + 1
                self._tables[array] = place
                prefix = (*array, place)
                self._note(prefix)
                self._skip("]]")
            elif self._text[self._at] == "[":
                self._at += 1
                prefix = self._resolved(self._key())
                self._note(prefix)
                self._skip("]")
            else:
                self._pair(prefix)
        return self._found

    def _next(self) -> bool:
        """Move to the next character that is neither space nor comment. Returns False at the end."""
        match = _SPACE.match(self._text, self._at)
        self._at = match.end() if match else self._at
        return self._at < len(self._text)

    def _skip(self, mark: str) -> None:
        self._next()
        if self._text.startswith(mark, self._at):
            self._at += len(mark)

    def _note(self, place: Place) -> None:
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        for end in range(1, len(place) + 1):
            self._found.setdefault(place[:end], self._line)

    def _resolved(self, key: Place) -> Place:
        """The path of a table's header, with the latest table of each array of tables that it goes through."""
        path: Place = ()
        for depth, part in enumerate(key):
            path = (*path, part)
            if depth < len(key) - 1 and path in self._tables:
                path = (*path, self._tables[path])
        return path

    def _key(self) -> Place:
        parts: list[str] = []
        while True:
            self._next()
            if match := _STRING.match(self._text, self._at):
                parts.append(_unquoted(match[0]))
            elif match := BARE.match(self._text, self._at):
                parts.append(match[0])
            else:
                self._at += 1
                return tuple(parts)
            self._at = match.end()
            self._next()
            if not self._text.startswith(".", self._at):
                return tuple(parts)
            self._at += 1

    def _pair(self, prefix: Place) -> None:
        start = self._at
        place = (*prefix, *self._key())
        after, self._at = self._at, start
        self._note(place)
        self._at = after
        self._skip("=")
        self._value(place)

    def _value(self, place: Place) -> None:
        if not self._next():
            return
        first = self._text[self._at]
        if first == "[":
            self._at += 1
            self._members(place, "]")
        elif first == "{":
            self._at += 1
            self._members(place, "}")
        elif match := _STRING.match(self._text, self._at) or _SCALAR.match(self._text, self._at):
            self._at = match.end()
        else:
            self._at += 1

    def _members(self, place: Place, end: str) -> None:
        number = 0
        while self._next() and self._text[self._at] != end:
            if self._text[self._at] == ",":
                self._at += 1
            elif end == "}":
                self._pair(place)
            else:
                self._note((*place, number))
                self._value((*place, number))
                number += 1
        self._at += 1
