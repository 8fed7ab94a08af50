"""The policy that `learn` proposes: a drop-in for `conf.d/`, and the configuration that it makes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import typer

from nfq_agent.cli import show
from nfq_agent.cli.flags import Flags
from nfq_agent.cli.learned import Learned
from nfq_agent.config.file import load
from nfq_agent.config.models import Config, QueueConfig
from nfq_agent.elements.policy import Policy
from nfq_agent.public_suffixes import PublicSuffixes

SUFFIXES: Final = Path("/usr/share/publicsuffix/public_suffix_list.dat")
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
    """The name of the policy for a queue."""
    return f"learned-{queue}"


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
            "rule": [{"action": "accept", **wish.table} for wish in wishes],
        }
        for name, wishes in wished.items()
    }  # fmt: skip
    queues = {name: {"mode": "enforce", "elements": _chain(base, name, base.queue[name])} for name in wished}
    return adjusted(flags, queues, elements)


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
    """The elements of a queue with the learned policy in place of its policies, behind dpi."""
    specs = config.packet_elements(queue)
    others = [spec.name for spec in specs if not issubclass(spec.cls, Policy) and spec.name != "dpi"]
    return ["dpi", element_of(name), *others]


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
    for wish, evidence in learned.evidence.items():
        lines += ["", evidence.comment, f"[[element.{element_of(name)}.rule]]", 'action = "accept"']
        lines += [f"{key} = {_toml(value)}" for key, value in wish.table.items()]
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    """A string, a number or a list of strings as TOML has them: JSON's escapes are TOML's, but for the delete character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
