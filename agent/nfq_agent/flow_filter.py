"""The filter language for flows: `unit = payments.service and name ~ *.stripe.com and verdict = drop`. No I/O, no clock.

    filter     = all ("or" all)*
    all        = one ("and" one)*
    one        = "not" one | "(" filter ")" | FIELD operator VALUE ("," VALUE)*
    operator   = "=" | "!=" | "~" | "!~" | "<" | "<=" | ">" | ">="

Of several values one has to fit (with `!=` and `!~`: none may fit). `=` on an address takes a network, on a number a range
(`8000:8010`); sizes and durations have the units of the configuration (`bytes > 1MB`). `~` takes a shell pattern. A value with
spaces, commas or parentheses is in double quotes. A field that is not known of a flow fits nothing, so that `not` and `!=` hold
for it.
"""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any, Final

from nfq_agent.patterns import Patterns
from nfq_agent.protocols.known import OWNERS
from nfq_agent.values import LAST_PORT, duration, size

Record = Mapping[str, Any]
# Names that a client shows, which `name` stands for.
NAMES: Final = ("tls_sni", "http_host", "dns_name")
_EITHER: Final = {"name": NAMES, "host": ("src", "dst"), "port": ("sport", "dport"), "protocol": ("protocol", "proto")}
ADDRESSES: Final = frozenset(("src", "dst", "host"))
NUMBERS: Final = frozenset(("sport", "dport", "port", "uid", "gid", "queue", "packets", "bytes", "duration"))
_TEXTS: Final = (
    "unit", "container", "cgroup", "exe", "name", "protocol", "verdict", "rule", "element", "reason", "hook", "interface",
    "direction", "event",
)  # fmt: skip
FIELDS: Final = tuple(sorted({*ADDRESSES, *NUMBERS, *_TEXTS, *OWNERS}))
VERDICTS: Final = ("accept", "drop", "reject", "would-drop")
# Fields with few values, and what one of them is called.
ALLOWED: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "verdict": ("a verdict", VERDICTS),
    "hook": ("a hook", ("prerouting", "input", "forward", "output", "postrouting")),
    "direction": ("a direction", ("in", "out")),
}
_PORTS: Final = frozenset(("sport", "dport", "port"))
# Numbers that may have a unit, as in the configuration: what reads one, and what is allowed.
_UNITS: Final[Mapping[str, tuple[Callable[[object], float], str]]] = {
    "bytes": (size, "a size; allowed: a number of bytes, or a number with kB, MB or GB, as in 64MB"),
    "duration": (duration, "a duration; allowed: a number of seconds, or a number with us, ms, s, m or h, as in 5m"),
}
_NUMBER: Final = re.compile(r"[0-9]+(\.[0-9]+)?")
_TOKEN: Final = re.compile(
    r'\s*(?:(?P<quoted>"[^"]*")|(?P<operator>!=|!~|<=|>=|=|~|<|>)|(?P<mark>[(),])|(?P<word>[^\s"=~<>!(),]+))'
)
_COMPARE: Final[Mapping[str, Callable[[float, float], bool]]] = {
    "<": float.__lt__, "<=": float.__le__, ">": float.__gt__, ">=": float.__ge__,
}  # fmt: skip
_DEEPEST: Final = 50


class FilterError(ValueError):
    """A filter that cannot be read. position: of the character that is wrong, from 0."""

    def __init__(self, message: str, text: str, position: int) -> None:
        super().__init__(f"character {position + 1}: {message}")
        self.text = text
        self.position = position

    @property
    def pointed(self) -> str:
        """The line of the filter that is wrong, with a mark below the character, and the message: for a terminal."""
        before = self.text[: self.position].rpartition("\n")[2]
        line = before + self.text[self.position :].partition("\n")[0]
        return f"{line}\n{''.join(map(_blank, before))}^ {self.args[0]}"

    @property
    def quoted(self) -> str:
        """The message and the text from that character on: for a line."""
        what, mark, allowed = str(self).partition("; allowed: ")
        return f"{what}: {self.text[self.position :][:20]!r}{mark}{allowed}"


@dataclass(frozen=True, slots=True)
class Value:
    """One value of a comparison. text: as it was written, without quotes."""

    text: str
    position: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """One field against its values. fits: whether a value of a flow does, before `!` is applied."""

    field: str
    operator: str
    values: tuple[Value, ...]
    position: int
    fits: Callable[[Any], bool]

    def match(self, record: Record) -> bool:
        """Whether a flow meets it."""
        found = False
        for key in _EITHER.get(self.field, (self.field,)):
            value = record.get(key)
            if key == "verdict" and record.get("would") == "drop":
                value = "would-drop"
            if value is not None and self._any(value):
                found = True
        return found != self.operator.startswith("!")

    def _any(self, value: Any) -> bool:
        return any(map(self.fits, value)) if isinstance(value, list | tuple) else self.fits(value)


@dataclass(frozen=True, slots=True)
class Not:
    """The opposite."""

    part: FilterPart
    position: int

    def match(self, record: Record) -> bool:
        """Whether a flow meets it."""
        return not self.part.match(record)


@dataclass(frozen=True, slots=True)
class All:
    """Every part has to hold."""

    parts: tuple[FilterPart, ...]

    def match(self, record: Record) -> bool:
        """Whether a flow meets it."""
        return all(part.match(record) for part in self.parts)


@dataclass(frozen=True, slots=True)
class Either:
    """One part is enough."""

    parts: tuple[FilterPart, ...]

    def match(self, record: Record) -> bool:
        """Whether a flow meets it."""
        return any(part.match(record) for part in self.parts)


FilterPart = Comparison | Not | All | Either
EVERYTHING: Final = All(())


def _blank(character: str) -> str:
    """Blanks as wide on a terminal as a character: a tab, or as many spaces."""
    if character == "\t":
        return character
    if unicodedata.combining(character):
        return ""
    return "  " if unicodedata.east_asian_width(character) in "WF" else " "


def parse(text: str) -> FilterPart:
    """The filter that a text says; an empty one fits every flow. Raises FilterError."""
    if not text.strip():
        return EVERYTHING
    reader = _Reader(text)
    found = reader.either(0)
    if reader.peek() is not None:
        raise reader.wrong('expected "and", "or" or the end')
    return found


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens: list[tuple[str, str, int]] = []
        self._next = 0
        place = 0
        while text[place:].strip():
            match = _TOKEN.match(text, place)
            if match is None:
                place += len(text[place:]) - len(text[place:].lstrip())
                raise FilterError("an unclosed quotation mark, or a character that is not an operator", text, place)
            kind = match.lastgroup or ""
            self._tokens.append((kind, match[kind].strip('"') if kind == "quoted" else match[kind], match.start(kind)))
            place = match.end()

    def peek(self) -> str | None:
        """The next token in small letters, None at the end; a quoted text is never a keyword."""
        if self._next == len(self._tokens):
            return None
        kind, text, _ = self._tokens[self._next]
        return '"' if kind == "quoted" else text.lower()

    def wrong(self, message: str) -> FilterError:
        """An error at the next token."""
        return FilterError(message, self._text, self._position)

    @property
    def _position(self) -> int:
        return self._tokens[self._next][2] if self._next < len(self._tokens) else len(self._text)

    def either(self, depth: int) -> FilterPart:
        parts = [self._all(depth)]
        while self.peek() == "or":
            self._next += 1
            parts.append(self._all(depth))
        return parts[0] if len(parts) == 1 else Either(tuple(parts))

    def _all(self, depth: int) -> FilterPart:
        parts = [self._one(depth)]
        while self.peek() == "and":
            self._next += 1
            parts.append(self._one(depth))
        return parts[0] if len(parts) == 1 else All(tuple(parts))

    def _one(self, depth: int) -> FilterPart:
        if depth > _DEEPEST:
            raise self.wrong(f"more than {_DEEPEST} levels of parentheses")
        position = self._position
        if self.peek() == "not":
            self._next += 1
            return Not(self._one(depth + 1), position)
        if self.peek() == "(":
            self._next += 1
            found = self.either(depth + 1)
            if self.peek() != ")":
                raise self.wrong('expected ")"')
            self._next += 1
            return found
        return self._comparison()

    def _comparison(self) -> Comparison:
        field, position = self._take("word", "a field"), self._position_before()
        if field not in FIELDS:
            import difflib

            near = difflib.get_close_matches(field.lower(), FIELDS, 3)
            hint = f"like it: {', '.join(near)}" if near else f"for example {', '.join(_TEXTS[:6])}"
            raise FilterError(f"{field!r} is not a field; {hint}", self._text, position)
        operator = self._take("operator", "an operator: = != ~ !~ < <= > >=")
        operator_at = self._position_before()
        values = [self._value()]
        while self.peek() == ",":
            self._next += 1
            values.append(self._value())
        return Comparison(field, operator, tuple(values), position, self._fits(field, operator, operator_at, values))

    def _value(self) -> Value:
        if self._next < len(self._tokens) and self._tokens[self._next][0] in ("word", "quoted"):
            _, text, position = self._tokens[self._next]
            self._next += 1
            return Value(text, position)
        raise self.wrong("expected a value")

    def _take(self, kind: str, what: str) -> str:
        if self._next == len(self._tokens) or self._tokens[self._next][0] != kind:
            raise self.wrong(f"expected {what}")
        self._next += 1
        return self._tokens[self._next - 1][1]

    def _position_before(self) -> int:
        return self._tokens[self._next - 1][2]

    def _fits(self, field: str, operator: str, operator_at: int, values: list[Value]) -> Callable[[Any], bool]:
        plain = operator.removeprefix("!") or operator
        if operator in _COMPARE:
            if field not in NUMBERS:
                raise FilterError(f"{operator} compares numbers, and {field} is not a number", self._text, operator_at)
            bound, compare = self._number(values[0], field), _COMPARE[operator]
            if len(values) > 1:
                raise FilterError(f"{operator} takes one value", self._text, values[1].position)
            return lambda value: compare(float(value), bound)
        if plain == "~":
            if field in NUMBERS or field in ADDRESSES:
                raise FilterError(f"~ compares texts, and {field} is not a text; allowed: =", self._text, operator_at)
            return Patterns([value.text for value in values], caseless=True).match
        if field in ADDRESSES:
            networks = [self._network(value) for value in values]
            return lambda value: any(ip_address(value) in network for network in networks)
        if field in NUMBERS:
            ranges = [self._range(value, field) for value in values]
            return lambda value: any(low <= float(value) <= high for low, high in ranges)
        what, allowed = ALLOWED.get(field, ("", ()))
        for value in values:
            if allowed and value.text.lower() not in allowed:
                raise FilterError(f"{value.text!r} is not {what}; allowed: {', '.join(allowed)}", self._text, value.position)
        wanted = {value.text.lower() for value in values}
        return lambda value: str(value).lower() in wanted

    def _number(self, value: Value, field: str) -> float:
        if _NUMBER.fullmatch(value.text) is not None:
            return float(value.text)
        read, wanted = _UNITS.get(field, (None, "a number"))
        if read is not None:
            with contextlib.suppress(ValueError):
                return float(read(value.text))
        raise FilterError(f"{value.text!r} is not {wanted}", self._text, value.position)

    def _range(self, value: Value, field: str) -> tuple[float, float]:
        low, colon, high = value.text.partition(":")
        first = self._number(Value(low, value.position), field)
        last = self._number(Value(high, value.position + len(low) + 1), field) if colon else first
        if last < first:
            raise FilterError(f"range {value.text} ends before it begins", self._text, value.position)
        if field in _PORTS and (last > LAST_PORT or "." in value.text):
            raise FilterError(f"{value.text!r} is not a port; allowed: 0 to {LAST_PORT}", self._text, value.position)
        return first, last

    def _network(self, value: Value) -> IPv4Network | IPv6Network:
        try:
            return ip_network(value.text, strict=False)
        except ValueError:
            raise FilterError(f"{value.text!r} is not an address or a network", self._text, value.position) from None
