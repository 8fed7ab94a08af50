"""Which domain a name was registered under, by the list of public suffixes (https://publicsuffix.org/list/). Pure."""

from __future__ import annotations

from collections.abc import Iterable


class PublicSuffixes:
    """The rules of the list. lines: of the file as it is published."""

    def __init__(self, lines: Iterable[str]) -> None:
        rules = (line.split()[0].lower() for line in lines if line.strip() and not line.startswith("//"))
        self._rules = frozenset(rule if rule.isascii() else rule.encode("idna").decode() for rule in rules)

    def registrable(self, name: str) -> str:
        """The registered domain of a name: `example.co.uk` of `www.example.co.uk`; the name itself if it is a public suffix."""
        labels = name.lower().rstrip(".").split(".")
        size = next((size for size in range(len(labels), 0, -1) if self._is_suffix(labels[-size:])), 1)
        if f"!{'.'.join(labels[-size:])}" in self._rules:
            size -= 1
        return ".".join(labels[-size - 1 :])

    def _is_suffix(self, labels: list[str]) -> bool:
        text = ".".join(labels)
        return text in self._rules or f"!{text}" in self._rules or ".".join(["*", *labels[1:]]) in self._rules
