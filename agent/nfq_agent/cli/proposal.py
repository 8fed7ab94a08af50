"""The policy that `learn` proposes: a drop-in for `conf.d/`, and the configuration that it makes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final
from zlib import crc32

import typer

from nfq_agent.cli import show
from nfq_agent.cli.explain import is_dpi
from nfq_agent.cli.flags import Flags
from nfq_agent.cli.learned import Learned, Wish
from nfq_agent.config.file import load
from nfq_agent.config.models import Config, QueueConfig
from nfq_agent.element import PacketElement
from nfq_agent.elements.policy import Policy
from nfq_agent.match import APPLICATIONS
from nfq_agent.public_suffixes import PublicSuffixes

SUFFIXES: Final = Path("/usr/share/publicsuffix/public_suffix_list.dat")
_LONGEST_NAME: Final = 32
# Flows without a rule that are listed.
_LISTED: Final = 20


def grouping() -> Callable[[str], str]:
    """The registered domain of a name, by the list of public suffixes of this host. Raises typer.BadParameter without it."""
    try:
        with SUFFIXES.open(encoding="utf-8") as lines:
            return PublicSuffixes(lines).registrable
    except OSError as error:
        raise typer.BadParameter(
            f"--by-domain needs {SUFFIXES}: {error.strerror}; install the package publicsuffix (Fedora: publicsuffix-list)"
        ) from error


def element_of(queue: str) -> str:
    """The name of the policy for a queue; a long one is shortened, since the name of an element has 32 characters at most."""
    name = f"learned-{queue}"
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 9]}-{crc32(queue.encode()):08x}"


def write(config: Config, learned: Mapping[str, Learned], output: Path | None) -> bool:
    """Write the proposal, to stdout without a file. False if the file cannot be written, which is printed."""
    text = "\n".join(_drop_in(config, name, queue, learned[name]) for name, queue in config.queue.items() if len(learned[name]))
    if output is None:
        print(text, end="")
        return True
    try:
        output.write_text(text)
    except OSError as error:
        show.error(f"nfq-agent: {output}: {error.strerror}")
        return False
    return True


def proposed(flags: Flags, base: Config, learned: Mapping[str, Learned]) -> Config:
    """The configuration with the proposal, enforced. base: without it."""
    wished = {name: list(each.evidence) for name, each in learned.items() if len(each)}
    elements = {
        element_of(name): {
            "type": "policy", "default": "drop", "undecided": "accept",
            "rule": _rules(wishes),
        }
        for name, wishes in wished.items()
    }  # fmt: skip
    queues = {name: {"mode": "enforce", "elements": _chain(base, name, base.queue[name])} for name in wished}
    return adjusted(flags, queues, elements)


def _rules(wishes: Iterable[Wish]) -> list[dict[str, Any]]:
    """The tables of the rules.

    A policy that asks for headers alone judges each packet by itself, and would drop the answers to what it accepts. Where no
    rule asks for more, the first asks for what is known of every flow: then flows are judged.
    """
    wishes = list(wishes)
    rules: list[dict[str, Any]] = [{"action": "accept", **wish.table} for wish in wishes]
    if rules and not any(wish.fact or wish.owner or wish.protocol in APPLICATIONS for wish in wishes):
        rules[0]["facts"] = {"dpi": "*"}
    return rules


def adjusted(flags: Flags, queues: Mapping[str, Mapping[str, Any]], elements: Mapping[str, Any] | None = None) -> Config:
    """The configuration with other keys in tables of its queues, and with more elements."""

    def adjust(merged: dict[str, Any]) -> dict[str, Any]:
        del merged
        return {"queue": queues, "element": dict(elements or {})}

    return load(flags.config, adjust)


def rules_in(learned: Mapping[str, Learned]) -> int:
    """How many rules are proposed, for all queues."""
    return sum(map(len, learned.values()))


def say_coverage(learned: Mapping[str, Learned], covered: int, flows: int, where: str, missed: Iterable[str]) -> None:
    """Print how many flows the rules accept, and which not."""
    number = rules_in(learned)
    said = "1 rule; it accepts" if number == 1 else f"{number} rules; they accept"
    show.error(f"{said} {covered} of {flows} flows {where}")
    lines = list(missed)
    for line in lines[:_LISTED]:
        show.error(f"  not covered: {line}")
    if len(lines) > _LISTED:
        show.error(f"  and {len(lines) - _LISTED} more")


def _chain(config: Config, name: str, queue: QueueConfig) -> list[str]:
    """The elements of a queue with the learned policy in place of its policies, behind dpi.

    It decides on every packet: what may decide too, and was asked before, stays in front of it.
    """
    specs = config.packet_elements(queue)
    policies = [place for place, spec in enumerate(specs) if issubclass(spec.cls, Policy)]
    deciding = [place for place, spec in enumerate(specs) if spec.cls.decide is not PacketElement.decide]
    place = policies[0] if policies else deciding[-1] + 1 if deciding else 0
    before, behind = ([spec for spec in part if not issubclass(spec.cls, Policy)] for part in (specs[:place], specs[place:]))
    finder = next((spec.name for spec in specs if is_dpi(spec)), "dpi")
    front = [spec.name for spec in before]
    front += [finder] * (finder not in front)
    return [*front, element_of(name), *(spec.name for spec in behind if spec.name != finder)]


def _drop_in(config: Config, name: str, queue: QueueConfig, learned: Learned) -> str:
    lines = [
        "# Proposed by nfq-agent learn. Read it, put it into conf.d/, watch what it",
        "# would drop, then set mode to enforce.",
        f"[queue.{name}]",
        'mode = "monitor"',
        f"elements = {_toml(_chain(config, name, queue))}",
        "",
        f"[element.{element_of(name)}]",
        'type = "policy"',
        'default = "drop"',
        'undecided = "accept"',
    ]
    for evidence, rule in zip(learned.evidence.values(), _rules(learned.evidence), strict=True):
        lines += ["", evidence.comment, f"[[element.{element_of(name)}.rule]]"]
        lines += [f'facts.dpi = "{value["dpi"]}"' if key == "facts" else f"{key} = {_toml(value)}" for key, value in rule.items()]
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    """A string, a number or a list of strings as TOML has them: JSON's escapes are TOML's, but for the delete character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
