"""Answers the shell's questions for completions without the command line's library, which takes longer to load than to answer.

It reads a table of the verbs that the package is built with (`packaging/completions`), and answers as the library would.
Questions that the table does not cover, and a tree without the table, are left to the library.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nfq_agent.cli.completing import offered

# A value with its help.
_Item = tuple[str, str]


def answer(environment: Mapping[str, str], table: Mapping[str, Any]) -> str | None:
    """What to print for the shell; None where the library is to answer. table: as `packaging/completions` makes it."""
    shell = environment.get("_NFQ_AGENT_COMPLETE", "").removeprefix("complete_")
    try:
        asked = _asked(shell, environment)
    except ValueError:
        return None
    if asked is None or (found := _found(table, *asked)) is None:
        return None
    items = list(found)
    if shell == "bash":
        return "\n".join(value for value, _ in items)
    if shell == "zsh":
        return f"_arguments '*: :(({chr(10).join(map(_zsh, items))}))'" if items else "_files"
    return "\n".join(f"{value}\t{text}" if text else value for value, text in items)


def _asked(shell: str, environment: Mapping[str, str]) -> tuple[list[str], str] | None:
    """The words before the one that is typed, and that one; None for another shell or question. Raises ValueError."""
    if shell == "bash":
        words, number = shlex.split(environment["COMP_WORDS"]), int(environment["COMP_CWORD"])
        return words[1:number], words[number] if number < len(words) else ""
    if shell == "zsh" or (shell == "fish" and environment.get("_TYPER_COMPLETE_FISH_ACTION") == "get-args"):
        text = environment.get("_TYPER_COMPLETE_ARGS", "")
        words = shlex.split(text)[1:]
        return (words[:-1], words[-1]) if words and not text.endswith(" ") else (words, "")
    return None


def _found(table: Mapping[str, Any], before: Sequence[str], typed: str) -> Iterator[_Item] | None:
    verbs: Mapping[str, Any] = table["verbs"]
    if not before:
        if typed.startswith("-"):
            return _options(table["options"], before, typed)
        return ((name, verb["help"]) for name, verb in verbs.items() if name.startswith(typed))
    verb = verbs.get(before[0])
    if verb is None or "--" in before or "=" in typed.partition(" ")[0]:
        return None
    valued = {name: option for option in verb["options"] if option["valued"] for name in option["names"]}
    if before[-1] in valued:
        return None if typed.startswith("-") else _choices(valued[before[-1]], typed)
    if typed.startswith("-"):
        return _options(verb["options"], before, typed)
    place = _positionals(before[1:], valued)
    if place is None or place >= len(verb["arguments"]):
        return None
    argument = verb["arguments"][place]
    if argument["fields"]:
        return ((text, "") for text in offered(typed, table["fields"]))
    return _choices(argument, typed)


def _positionals(words: Sequence[str], valued: Mapping[str, Any]) -> int | None:
    """How many arguments are given; None where a word is not understood."""
    count = 0
    waits = False
    for word in words:
        if waits:
            waits = False
        elif word in valued:
            waits = True
        elif word.startswith("-"):
            if "=" in word:
                return None
        else:
            count += 1
    return count


def _options(options: Sequence[Mapping[str, Any]], before: Sequence[str], typed: str) -> Iterator[_Item]:
    given = {word.partition("=")[0] for word in before}
    for option in options:
        if not given & {*option["names"]}:
            yield from ((name, option["help"]) for name in option["names"] if name.startswith(typed))


def _choices(parameter: Mapping[str, Any], typed: str) -> Iterator[_Item] | None:
    choices = parameter["choices"]
    return None if choices is None else ((each, "") for each in choices if each.startswith(typed))


def _zsh(item: _Item) -> str:
    value, text = (
        each.replace('"', '""').replace("'", "''").replace("$", "\\$").replace("`", "\\`").replace(":", r"\\:") for each in item
    )
    return f'"{value}":"{text}"' if text else f'"{value}"'
