"""Answers the shell's questions for completions without the command line's library, which takes longer to load than to answer.

It reads a table of the verbs that the package is built with (`packaging/completions`). A tree without the table leaves the
questions to the library. Where nothing is offered the shell completes names of files.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from nfq_agent.cli.completing import filled

# A value with its help.
_Item = tuple[str, str]
_CONFIG = ("--config", "-c")
# A character that no line has.
_END = "\0"


def answer(environment: Mapping[str, str], table: Mapping[str, Any]) -> tuple[str, int] | None:
    """What to print for the shell, and the exit code; None where the library is to answer. table: as `packaging/completions`
    makes it."""
    shell = environment.get("_NFQ_AGENT_COMPLETE", "").removeprefix("complete_")
    asked = _asked(shell, environment)
    if asked is None:
        return None
    items = list(_found(table, *asked))
    if shell == "bash":
        return "\n".join(value for value, _ in items), 0
    if shell == "zsh":
        return f"_arguments '*: :(({chr(10).join(map(_zsh, items))}))'" if items else "_files", 0
    if environment.get("_TYPER_COMPLETE_FISH_ACTION") == "is-args":
        return "", 0 if items else 1
    return "\n".join(f"{value}\t{text}" if text else value for value, text in items), 0


def _asked(shell: str, environment: Mapping[str, str]) -> tuple[list[str], str] | None:
    """The words before the one that is typed, and that one; None for another shell or question."""
    if shell == "bash":
        words = _split(environment.get("COMP_WORDS", ""))
        number = environment.get("COMP_CWORD", "")
        if not number.isdecimal():
            return None
        return words[1 : int(number)], words[int(number)] if int(number) < len(words) else ""
    if shell in ("zsh", "fish"):
        words = _split(environment.get("_TYPER_COMPLETE_ARGS", "") + _END)
        return words[1:-1], words[-1].removesuffix(_END) if len(words) > 1 else ""
    return None


def _split(text: str) -> list[str]:
    """The words of a line; the last one may have a quotation mark that is not closed yet."""
    reader = shlex.shlex(text, posix=True, punctuation_chars=False)
    reader.whitespace_split, reader.commenters = True, ""
    words: list[str] = []
    try:
        words += reader
    except ValueError:
        words.append(reader.token)
    return words


def _found(table: Mapping[str, Any], before: Sequence[str], typed: str) -> Iterable[_Item]:
    verbs: Mapping[str, Any] = table["verbs"]
    place = next((place for place, word in enumerate(before) if not word.startswith("-")), None)
    if place is None:
        if typed.startswith("-"):
            return _options(table["options"], before, typed)
        return ((name, verb["help"]) for name, verb in verbs.items() if name.startswith(typed))
    verb = verbs.get(before[place])
    if verb is None:
        return ()
    before = before[place + 1 :]
    valued = {name: option for option in verb["options"] if option.get("valued") for name in option["names"]}
    given = _given(before, valued)
    if before and before[-1] in valued and "--" not in before:
        return _values(valued[before[-1]], typed, given, table)
    name, equals, start = typed.partition("=")
    if typed.startswith("-") and "--" not in before:
        if equals and name in valued:
            return ((f"{name}={value}", text) for value, text in _values(valued[name], start, given, table))
        return _options(verb["options"], before, typed)
    count = len(given[""])
    arguments = verb["arguments"]
    if count >= len(arguments) and not (arguments and arguments[-1].get("many")):
        return ()
    # `chaos off` takes nothing else.
    if count and given[""][0] == "off":
        return ()
    return _values(arguments[min(count, len(arguments) - 1)], typed, given, table)


def _given(words: Sequence[str], valued: Mapping[str, Any]) -> dict[str, list[str]]:
    """The values that the words have, by option; of arguments, by the empty name."""
    found: dict[str, list[str]] = {"": []}
    waits = ""
    options = True
    for word in words:
        name, equals, value = word.partition("=")
        if waits:
            found.setdefault(waits, []).append(word)
            waits = ""
        elif options and word == "--":
            options = False
        elif options and word in valued:
            waits = word
        elif options and word.startswith("-") and word != "-":
            if equals:
                found.setdefault(name, []).append(value)
        else:
            found[""].append(word)
    return found


def _options(options: Sequence[Mapping[str, Any]], before: Sequence[str], typed: str) -> Iterator[_Item]:
    given = {word.partition("=")[0] for word in before}
    for option in options:
        if option.get("many") or not given & {*option["names"]}:
            yield from ((name, option.get("help", "")) for name in option["names"] if name.startswith(typed))


def _values(
    parameter: Mapping[str, Any], typed: str, given: Mapping[str, list[str]], table: Mapping[str, Any]
) -> Iterator[_Item]:
    """What an option or an argument may have."""
    kind = parameter.get("offers", "")
    known = list(parameter.get("choices", ()))
    if kind:
        from nfq_agent.cli.offered_names import offered, values_of

        config = next((value for name in _CONFIG for value in given.get(name, ())), None)
        instance = next(iter(given.get("--instance", ())), None)
        if kind == "filter":
            yield from ((text, "") for text in filled(typed, table["fields"], values_of(config, instance)))
            return
        known += offered(kind, config, instance)
    # Keys with values (`drop=0.2`) are given once.
    used = {word.partition("=")[0] for word in given[""]}
    for each in dict.fromkeys(known):
        if each.startswith(typed) and not (each.endswith("=") and each[:-1] in used):
            yield each, ""


def _zsh(item: _Item) -> str:
    value, text = (
        each.replace('"', '""').replace("'", "''").replace("$", "\\$").replace("`", "\\`").replace(":", r"\\:") for each in item
    )
    return f'"{value}":"{text}"' if text else f'"{value}"'
