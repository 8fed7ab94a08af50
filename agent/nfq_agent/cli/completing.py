"""Shell completion of one value: what is typed of a filter, and names that do not change. No I/O.

In a filter a field, an operator, a value or a conjunction is offered where each is expected, with the text before it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

# For each field its operators, and the values that do not change.
FilterFields = Mapping[str, Mapping[str, Any]]
_TOKEN: Final = re.compile(
    r'\s*(?:(?P<quoted>"[^"]*")|(?P<operator>!=|!~|<=|>=|=|~|<|>)|(?P<mark>[(),])|(?P<word>[^\s"=~<>!(),]+))'
)
_BARE: Final = re.compile(r'[^\s"=~<>!(),]+')
_KEYWORDS: Final = ("and", "or", "not")
_TIMES: Final = ("10s", "60s", "5m", "1h", "24h")
_SIZES: Final = ("1kB", "1MB", "1GB")


def filled(typed: str, fields: FilterFields, values: Callable[[str], Iterable[str]]) -> list[str]:
    """The typed filter with each continuation that its last word may have. values: of a field, beside the fixed ones."""
    found = _split(typed)
    if found is None:
        return []
    tokens, before, word = found
    expected, field, operator = _expected(tokens)
    if before and before[-1] not in " \t(":
        before += " "
    match expected:
        case "field":
            names = [name for name in (*fields, *["not"] * bool(word)) if name.startswith(word)]
            # With its operators, since a shell takes a single answer for the whole argument.
            if len(names) == 1 and names[0] in fields:
                names = [f"{names[0]} {each}" for each in fields[names[0]]["operators"]]
            return [before + name for name in names]
        case "operator" if field in fields:
            return [before + each for each in fields[field]["operators"] if each.startswith(word)]
        case "value" if field in fields:
            known = dict.fromkeys((*fields[field]["values"], *values(field)))
            # `=` on a text takes no pattern.
            if "~" in fields[field]["operators"] and operator in ("=", "!="):
                known = dict.fromkeys(each for each in known if not re.search(r"[*?\[]", each))
            return [before + each for each in _values(known, word)]
        case "conjunction":
            return [before + each for each in _KEYWORDS[:2] if each.startswith(word)]
    return []


def _split(text: str) -> tuple[list[tuple[str, str]], str, str] | None:
    """The tokens before the word that is typed, the text before it, and that word; None where the filter is wrong."""
    tokens: list[tuple[str, str]] = []
    place = 0
    while match := _TOKEN.match(text, place):
        kind = match.lastgroup or ""
        tokens.append((kind, match[kind]))
        place = match.end()
    rest = text[place:]
    if word := rest.lstrip():
        # A quotation mark that is not closed yet, or the beginning of an operator.
        return (tokens, text[: len(text) - len(word)], word) if word[0] == '"' or word == "!" else None
    if not rest and tokens and tokens[-1][0] == "word":
        word = tokens.pop()[1]
        return tokens, text[: len(text) - len(word)], word
    return tokens, text, ""


def _expected(tokens: Iterable[tuple[str, str]]) -> tuple[str, str, str]:
    """What comes next, and the field and the operator of the comparison that is begun; nothing where the filter is wrong."""
    state, field, operator = "field", "", ""
    for kind, text in tokens:
        match state, kind, text.lower():
            case ("field", "mark", "(") | ("field", "word", "not"):
                continue
            case "field", "word", _:
                state, field = "operator", text
            case "operator", "operator", _:
                state, operator = "value", text
            case "value", "word" | "quoted", _:
                state = "conjunction"
            case "conjunction", "mark", ",":
                state = "value"
            case "conjunction", "mark", ")":
                continue
            case "conjunction", "word", "and" | "or":
                state = "field"
            case _:
                return "", "", ""
    return state, field, operator


def _values(known: Iterable[str], word: str) -> list[str]:
    """Those that begin with the typed word, as a filter has to have them."""
    start = word.removeprefix('"')
    return [
        each if _BARE.fullmatch(each) and each.lower() not in _KEYWORDS and word[:1] != '"' else f'"{each}"'
        for each in known
        if each.startswith(start) and '"' not in each
    ]


def filter_fields() -> dict[str, dict[str, Any]]:
    """The fields of a filter, for `filled`. Loads the language of filters and all protocols."""
    from nfq_agent.flow_filter import ADDRESSES, ALLOWED, FIELDS, NUMBERS
    from nfq_agent.protocols.known import BY_NAME

    values: dict[str, Sequence[str]] = {
        **{field: allowed for field, (_, allowed) in ALLOWED.items()},
        "event": ("begin", "change", "end"),
        "protocol": (*BY_NAME, *fixed("ip-protocol")),
        "bytes": _SIZES,
        "duration": _TIMES,
    }
    number = ("=", "!=", "<", "<=", ">", ">=")
    return {
        field: {
            "operators": list(number if field in NUMBERS else ("=", "!=") if field in ADDRESSES else ("=", "!=", "~", "!~")),
            "values": list(values.get(field, ())),
        }
        for field in FIELDS
    }


def fixed(kind: str) -> list[str]:
    """The names of a kind that do not change. Loads the modules that have them."""
    match kind:
        case "time":
            return [*_TIMES]
        case "ip-protocol":
            from nfq_agent.packet import PROTOCOL_NAMES

            return [*PROTOCOL_NAMES.values()]
        case "type":
            from nfq_agent.elements import PACKET_ELEMENTS, STREAM_ELEMENTS

            return [*PACKET_ELEMENTS, *STREAM_ELEMENTS]
        case "fault":
            from nfq_agent.elements.chaos import ChaosOptions

            return [f"{key}=" for key in ChaosOptions.model_fields if key != "generation"]
        case "form":
            from nfq_agent.cli.export import FORMS

            return [*FORMS]
    return []
