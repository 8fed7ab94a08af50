"""Shell patterns for names, many at a time: how many there are hardly matters. Pure."""

from __future__ import annotations

import fnmatch
import re
import unicodedata
from collections.abc import Iterable
from typing import Final, cast

# What begins a part of a pattern that is no plain text.
SPECIAL: Final = re.compile(r"[*?\[]")
# RFC 1035 2.3.4.
_LONGEST_LABEL: Final = 63
# What stands behind the last special character of a pattern, from its first dot on.
_TAIL: Final = re.compile(r"[^*?\[\].]*\.([^*?\[\]]+)\Z")


class Patterns:
    """Shell patterns in which `*` matches dots too. Names without special characters cost one look-up for all of them, and so do
    patterns that end with a dot and a plain name: only those with the name's own end are compared.

    every: of several values, as one message may have them, all have to fit, and not any.
    """

    def __init__(self, globs: Iterable[str], caseless: bool = False, every: bool = False) -> None:
        self._caseless = caseless
        self._every = every
        globs = [self._plainly(glob) for glob in globs]
        special = [glob for glob in globs if SPECIAL.search(glob)]
        self._names = frozenset(globs) - frozenset(special)
        # "*.NAME" is looked up too, so that a list of a hundred thousand of them costs no more than one.
        self._suffixes = frozenset(glob[2:] for glob in special if glob.startswith("*.") and not SPECIAL.search(glob[2:]))
        special = [glob for glob in special if not (glob.startswith("*.") and glob[2:] in self._suffixes)]
        self._by_tail: dict[str, list[str] | re.Pattern[str]] = {}
        others = []
        for glob in special:
            tail = _TAIL.search(glob)
            if tail is None:
                others.append(glob)
            else:
                cast("list[str]", self._by_tail.setdefault(tail[1], [])).append(glob)
        self._regex = _any_of(others) if others else None

    def _plainly(self, text: str) -> str:
        return text.lower().rstrip(".") if self._caseless else text

    @property
    def plain(self) -> tuple[frozenset[str], frozenset[str]] | None:
        """The whole names, and those of which what is below fits (`*.NAME`); None if there are other patterns."""
        return None if self._regex is not None or self._by_tail else (self._names, self._suffixes)

    def match(self, value: object) -> bool:
        """Whether a fact, or any of a tuple of them (`every`: each), fits one of the patterns."""
        if isinstance(value, tuple | list | set | frozenset):
            fits = [self.match(each) for each in value]
            return bool(fits) and (all(fits) if self._every else any(fits))
        # As TOML and JSON write it.
        text = self._plainly(str(value).lower() if isinstance(value, bool) else str(value))
        if text in self._names or ((self._suffixes or self._by_tail) and self._fits_by_its_end(text)):
            return True
        return self._regex is not None and self._regex.fullmatch(text) is not None

    def _fits_by_its_end(self, text: str) -> bool:
        dot = text.find(".")
        while dot >= 0:
            tail = text[dot + 1 :]
            if tail in self._suffixes:
                return True
            known = self._by_tail.get(tail)
            if known is not None:
                if isinstance(known, list):
                    # Of a long list few are ever asked for.
                    known = self._by_tail[tail] = _any_of(known)
                if known.fullmatch(text) is not None:
                    return True
            dot = text.find(".", dot + 1)
        return False


def with_ascii(globs: tuple[str, ...]) -> tuple[str, ...]:
    """Patterns of host names, each that has other letters than ASCII's also in the form that goes over the wire (RFC 5891).

    Raises ValueError for one that has no such form.
    """
    return globs if all(map(str.isascii, globs)) else (*globs, *(ascii_form(each) for each in globs if not each.isascii()))


def ascii_form(glob: str) -> str:
    """The form of a host name, or of a pattern of them, that goes over the wire. Raises ValueError."""
    return glob if glob.isascii() else ".".join(map(_ascii_label, glob.split(".")))


def _ascii_label(label: str) -> str:
    if label.isascii():
        return label
    # As programs write them now (RFC 5891): ß and ς stay letters of their own, as in no codec of Python.
    text = unicodedata.normalize("NFKC", label).lower()
    if text.isascii():
        return text
    form = f"xn--{text.encode('punycode').decode()}"
    if not SPECIAL.search(label) and len(form) <= _LONGEST_LABEL:
        return form
    raise ValueError(f"{label!r} is no part of a host name; allowed: letters, digits and hyphens, or a pattern of ASCII letters")


def _any_of(globs: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{fnmatch.translate(glob)})" for glob in globs))
