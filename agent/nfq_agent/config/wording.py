"""The errors of pydantic as messages about the configuration file."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from datetime import date, time
from typing import Any, Final, get_args

from pydantic import BaseModel, ValidationError

from nfq_agent.config.capture import INTERFACES, InlineConfig, TapConfig
from nfq_agent.config.lines import Place
from nfq_agent.config.model import Model
from nfq_agent.config.models import INSTANCE, INSTANCE_FORM, NAME, USER, Agent, Config, LogConfig, QueueConfig
from nfq_agent.config.proxy import ProxyConfig
from nfq_agent.config.rule import RuleConfig
from nfq_agent.config.source import Source, key_as_written
from nfq_agent.values import TableFaults

MANUAL: Final = "see nfq-agent.toml(5)"
# Branches of a union and names of validators are parts of pydantic's locations; they are not keys of the file.
_NO_KEYS: Final = re.compile(r"^(function-|tagged-union|constrained-|literal\[|int$|str$|bool$|float$|.*\[.*\]$)")
# What a value is not, and what is allowed instead, by pydantic's type of the error.
_WORDS: Final[Mapping[str, tuple[str, str]]] = {
    **dict.fromkeys(("bool_type", "bool_parsing"), ("neither true nor false", "true or false")),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), ("not a whole number", "a whole number")),
    **dict.fromkeys(("float_type", "float_parsing"), ("not a number", "a number")),
    **dict.fromkeys(("string_type", "string_sub_type"), ("not a string", "a string in quotes")),
    **dict.fromkeys(
        ("tuple_type", "list_type", "set_type", "frozen_set_type"), ("not a list", 'a list in brackets, as in ["a", "b"]')
    ),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type", "mapping_type"), ("not a table", "a table")),
    "path_type": ("not a path", "a path in quotes"),
    **dict.fromkeys(
        ("ip_v4_network", "ip_v6_network", "ip_any_network"), ("not a valid network", 'a network as "10.0.0.0/8" or "fd00::/8"')
    ),
    **dict.fromkeys(("ip_v4_address", "ip_v6_address", "ip_any_address"), ("not a valid address", "an IP address in quotes")),
    **dict.fromkeys(
        ("time_delta_type", "time_delta_parsing"),
        ("not a valid duration", '"0", or a number with us, ms, s, m or h, as in "5s"'),
    ),
}
# The values of keys that have a form, by its regular expression.
_FORMS: Final[Mapping[str, str]] = {
    INSTANCE: INSTANCE_FORM,
    NAME: "1 to 32 letters, digits, hyphens and underscores, the first one a letter or a digit",
    USER: "1 to 32 small letters, digits, hyphens and underscores, the first one no digit",
    INTERFACES: 'the name of an interface, or a pattern as "veth*"',
    "^/": "an absolute path: it begins with /",
}
# What is said of a value of another type.
_TYPES: Final = tuple(what for what, _ in _WORDS.values())
_TABLE_KINDS: Final = frozenset(("dict_type", "model_type", "model_attributes_type", "mapping_type"))


def model_faults(
    source: Source, error: ValidationError, prefix: Place = (), options: type[BaseModel] | None = None
) -> Iterator[str]:
    """One line for each value: what is wrong with it, and all that is allowed (a union reports an error for each member)."""
    found: dict[Place, tuple[str, list[str]]] = {}
    tables: set[Place] = set()
    together: list[tuple[Place, str, list[str]]] = []
    # Of a fault of a whole table, the key that it begins with has its line.
    lines: dict[tuple[Place, str], Place] = {}
    for details in error.errors():
        parts = (part for part in details["loc"] if isinstance(part, int) or not _NO_KEYS.match(part))
        location = (*prefix, *parts)
        if details["type"] == "too_short" and any(each[: len(location)] == location for each in found):
            # The list is empty once its bad members are removed.
            continue
        if isinstance(details["input"], Mapping) or details["type"] in _TABLE_KINDS:
            tables.add(location)
        error_here = details.get("ctx", {}).get("error")
        if isinstance(error_here, TableFaults):
            # Several things, none of them about the same.
            for at, text in error_here.faults:
                what, _, allowed = text.partition("; allowed: ")
                together.append(((*location, *at), what, [allowed]))
                lines[(*location, *at), what] = (*location, *at, *_key_in(what, details["input"]))
            continue
        what, allowed = _fault(location, details, options)
        kept, known = found.setdefault(location, (what, []))
        if details["type"] not in (*_WORDS, "literal_error") and kept.endswith(_TYPES):
            # Of a choice, the one of the value's own type says most.
            found[location] = (what, known)
        if allowed and allowed not in known:
            known.append(allowed)
    for location, what, allowed_here in (*((place, *each) for place, each in found.items()), *together):
        ends = f"; allowed: {', or '.join(allowed_here)}" if allowed_here else ""
        # A value in a list is named by itself, a table in a list by its number.
        key = location[:-1] if location and isinstance(location[-1], int) and location not in tables else location
        yield source.fault(lines.get((location, what), location), f"{what}{ends}", key)


def _key_in(what: str, table: object) -> Place:
    """The first key of a table that is named in what is said of it, if one is."""
    keys = table if isinstance(table, Mapping) else {}
    return next(((word,) for word in re.findall(r"[a-z0-9_]+", what) if word in keys), ())


def _fault(location: Place, details: Any, options: type[BaseModel] | None) -> tuple[str, str]:
    """What is wrong, and what is allowed."""
    kind, context = details["type"], details.get("ctx", {})
    if kind == "extra_forbidden":
        keys = tuple(part for part in location if isinstance(part, str))
        known = _known_keys(keys[:-1], options)
        near = difflib.get_close_matches(keys[-1], known, 1, 0.5)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        return f"unknown key{hint}", ", ".join(known) or MANUAL
    if kind == "value_error":
        what, _, allowed = str(context["error"]).partition("; allowed: ")
        # What checks a value knows it as Python has it.
        return what.replace(repr(details["input"]), _shown(details["input"]), 1), allowed
    if kind == "missing":
        return "is missing", f"{location[-1]} = VALUE; {MANUAL}"
    if details["input"] != details["input"]:
        kind = "float_type"
    what, allowed = _words(kind, context, str(details["msg"]))
    return f"{_shown(details['input'])} is {what}", allowed


def _words(kind: str, context: Mapping[str, Any], message: str) -> tuple[str, str]:
    if kind in _WORDS:
        return _WORDS[kind]
    if kind in ("literal_error", "enum"):
        return "unknown", str(context["expected"]).replace("'", "")
    if kind in ("greater_than_equal", "less_than_equal", "greater_than", "less_than"):
        sign, bound = next((key, value) for key, value in context.items() if key in ("ge", "le", "gt", "lt"))
        words = {"ge": "at least", "le": "at most", "gt": "more than", "lt": "less than"}[sign]
        return ("too small" if sign[0] == "g" else "too large"), f"{words} {bound}"
    if kind == "string_pattern_mismatch":
        return "not valid", _FORMS.get(context["pattern"], f"what matches {context['pattern']}")
    if kind in ("string_too_short", "string_too_long"):
        least = kind == "string_too_short"
        count = context["min_length" if least else "max_length"]
        return f"too {'short' if least else 'long'}", f"at {'least' if least else 'most'} {count} character{'s' * (count != 1)}"
    if kind == "too_short":
        return "too short", f"at least {context['min_length']} of them"
    if kind == "too_long":
        return "too long", f"at most {context['max_length']} of them"
    return "not valid", message.removeprefix("Input should be ").removeprefix("a valid ").lower() or MANUAL


def _shown(value: object) -> str:
    """A value as TOML has it, cut where it is long."""
    text = _toml(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{key_as_written(key)} = {_toml(each)}' for key, each in value.items())} }}" if value else "{}"
    if isinstance(value, date | time):
        return value.isoformat()
    return repr(value)


_TABLES: Final[Mapping[str, type[Model]]] = {
    "agent": Agent, "log": LogConfig, "queue": QueueConfig, "rules": RuleConfig, "proxy": ProxyConfig, "tap": TapConfig,
    "inline": InlineConfig,
}  # fmt: skip


def _known_keys(at: tuple[str, ...], options: type[BaseModel] | None) -> list[str]:
    if not at:
        return list(Config.model_fields)
    if at[0] == "element":
        inner = options
        for key in at[2:]:
            inner = None if inner is None or key not in inner.model_fields else _model_in(inner.model_fields[key].annotation)
        known = [] if inner is None else list(inner.model_fields)
        return ["type", *known] if len(at) == 2 else known
    model = _TABLES.get(at[0])
    return [] if model is None else [field.alias or name for name, field in model.model_fields.items()]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a key's type is made of, as in tuple[Model, ...]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for each in get_args(annotation) if (model := _model_in(each)) is not None), None)
