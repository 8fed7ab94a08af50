"""Shell patterns for names, many at a time: how many there are hardly matters. Pure."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from typing import Final

_SPECIAL: Final = re.compile(r"[*?\[]")


class Patterns:
    """Shell patterns in which `*` matches dots too. Names without special characters cost one look-up for all of them.

    every: of several values, as one message may have them, all have to fit, and not any.
    """

    def __init__(self, globs: Iterable[str], caseless: bool = False, every: bool = False) -> None:
        self._caseless = caseless
        self._every = every
        globs = [self._plainly(glob) for glob in globs]
        special = [glob for glob in globs if _SPECIAL.search(glob)]
        self._names = frozenset(globs) - frozenset(special)
        # "*.NAME" is looked up too, so that a list of a hundred thousand of them costs no more than one.
        self._suffixes = frozenset(glob[2:] for glob in special if glob.startswith("*.") and not _SPECIAL.search(glob[2:]))
        special = [glob for glob in special if not (glob.startswith("*.") and glob[2:] in self._suffixes)]
        self._regex = re.compile("|".join(f"(?:{fnmatch.translate(glob)})" for glob in special)) if special else None

    def _plainly(self, text: str) -> str:
        return text.lower().rstrip(".") if self._caseless else text

    @property
    def plain(self) -> tuple[frozenset[str], frozenset[str]] | None:
        """The whole names, and those of which what is below fits (`*.NAME`); None if there are other patterns."""
        return None if self._regex is not None else (self._names, self._suffixes)

    def match(self, value: object) -> bool:
        """Whether a fact, or any of a tuple of them (`every`: each), fits one of the patterns."""
        if isinstance(value, tuple | list | set | frozenset):
            fits = [self.match(each) for each in value]
            return bool(fits) and (all(fits) if self._every else any(fits))
        # As TOML and JSON write it.
        text = self._plainly(str(value).lower() if isinstance(value, bool) else str(value))
        if text in self._names or (self._suffixes and self._is_below(text)):
            return True
        return self._regex is not None and self._regex.fullmatch(text) is not None

    def _is_below(self, text: str) -> bool:
        dot = text.find(".")
        while dot >= 0:
            if text[dot + 1 :] in self._suffixes:
                return True
            dot = text.find(".", dot + 1)
        return False
