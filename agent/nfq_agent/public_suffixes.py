"""Which domain a name was registered under, by the list of public suffixes (https://publicsuffix.org/list/). Pure."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address


class PublicSuffixes:
    """The rules of the list. lines: of the file as it is published."""

    def __init__(self, lines: Iterable[str]) -> None:
        rules = (line.split()[0].lower() for line in lines if line.strip() and not line.startswith("//"))
        self._rules = frozenset(rule if rule.isascii() else rule.encode("idna").decode() for rule in rules)

    def registrable(self, name: str) -> str:
        """The registered domain of a name: `example.co.uk` of `www.example.co.uk`.

        Empty where there is none: for a public suffix, under which others register, a name of one word, and an address.
        """
        if _is_address(name):
            return ""
        labels = name.lower().rstrip(".").split(".")
        size = next((size for size in range(len(labels), 0, -1) if self._is_suffix(labels[-size:])), 1)
        if f"!{'.'.join(labels[-size:])}" in self._rules:
            size -= 1
        return ".".join(labels[-size - 1 :]) if size < len(labels) else ""

    def _is_suffix(self, labels: list[str]) -> bool:
        text = ".".join(labels)
        return text in self._rules or f"!{text}" in self._rules or ".".join(["*", *labels[1:]]) in self._rules


def _is_address(name: str) -> bool:
    try:
        ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
