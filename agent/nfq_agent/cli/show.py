"""The text on standard output: plans, rules, status, findings - as text and tables of at most 80 columns, or as JSON."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TextIO

from nfq_agent.rules.diff import Changes, Delete, DropChain, Insert, NewChain, render
from nfq_agent.rules.model import Family, Ruleset

if TYPE_CHECKING:
    from rich.console import Console

    from nfq_agent.cli.finding import Finding
    from nfq_agent.host.xtables.backend import RuleHost
    from nfq_agent.service.live_rules import ListedRule


@dataclass(frozen=True, slots=True)
class PolicyPlan:
    """What a plan says about policies. known: a running agent reported its policies; then the lines are the changes."""

    lines: list[str]
    known: bool

    @property
    def changed(self) -> bool:
        """Whether a reload would change verdicts."""
        return self.known and bool(self.lines)


_COMMANDS: Final[Mapping[Family, str]] = {"inet": "iptables", "inet6": "ip6tables"}
_WIDTH: Final = 80
# The fields and the entries of a map, in the text of a rule; how many entries are shown.
_ENTRIES: Final = re.compile(r"--of (?P<of>\S+) (?:! )?--(?:map|list) (?P<entries>\S+)")
_ENTRIES_SHOWN: Final = 10


def note(text: str) -> None:
    """One line on standard output."""
    print(text, flush=True)


def prose(text: str, indent: int = 0) -> None:
    """Sentences, wrapped between words where the terminal is narrower. indent: of the lines after the first."""
    _print_wrapped(text, " " * indent, sys.stdout.isatty() or "COLUMNS" in os.environ)


def wrapped(text: str, indent: int = 0) -> None:
    """A line that programs read too: it is wrapped, likewise, on a terminal alone."""
    _print_wrapped(text, " " * indent, sys.stdout.isatty())


def error(text: str) -> None:
    """A line on standard error, wrapped on a terminal."""
    _print_wrapped(text, "  ", sys.stderr.isatty(), sys.stderr)


def comment(text: str) -> None:
    """A comment (`# ...`) among lines that are commands: on a terminal, wrapped into several of them."""
    _print_wrapped(text, "# ", sys.stdout.isatty())


def _print_wrapped(text: str, later: str, wanted: bool, stream: TextIO | None = None) -> None:
    """stream: standard output if None."""
    width = _columns() if wanted else 0
    for line in text.splitlines() or [""]:
        print(_filled(line, width, later) if width else line, file=stream, flush=True)


def _columns() -> int:
    """Of the terminal; 0 where that is not known."""
    import shutil

    return shutil.get_terminal_size((0, 0)).columns


def _filled(line: str, width: int, later: str) -> str:
    import textwrap

    # A path or an address is left whole, so that it can be copied.
    return textwrap.fill(line, width, subsequent_indent=later, break_on_hyphens=False, break_long_words=False)


def json_object(value: Mapping[str, Any]) -> None:
    """One JSON object, indented."""
    print(json.dumps(value, indent=2, default=str))


def console(on_standard_error: bool = False, width_of_library: bool = False) -> Console:
    """Standard output for tables: as wide as the terminal, or 80 columns without one.

    width_of_library: without a terminal, COLUMNS counts.
    """
    # Importing rich takes a tenth of a second; only code that draws a table does it.
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            # The library would exit with 1; what it means is said in one place (__main__).
            raise BrokenPipeError

    return Output(
        stderr=on_standard_error,
        width=None if width_of_library or sys.stdout.isatty() else _WIDTH,
        highlight=False,
        soft_wrap=False,
    )


def side_effects(ruleset: Ruleset, host: RuleHost, user: str | None) -> list[str]:
    """What applying would change besides the rules. user: the system user's name if it would have to be made."""
    effects = [host.notice] if host.notice else []
    if user is not None:
        effects.append(f"the system user {user} would be created; the rules then contain its number instead of its name")
    if ruleset and host.name == "owned":
        effects.append("the rules are in nf_tables: `nft list ruleset` lists them, `iptables` does not")
        return effects
    for family, tables in ruleset.items():
        present = host.present(family)
        if present is None:
            effects.append(f"which {family} tables are present is visible to root only")
            continue
        effects += [
            f"the {family} table {table} would become present, and stays so as long as this network namespace exists"
            for table in sorted(set(tables) - present)
        ]
    if ruleset:
        effects.append("the rules are legacy ones: `iptables-legacy -S` lists them, an `iptables` of the nft kind does not")
    return effects


def plan(instance: str, backend: str, changes: Mapping[Family, Changes], besides: Sequence[str], policy: PolicyPlan) -> None:
    """The plan as text: a summary line, then rules, then what they do not show."""
    # Imported only here: other verbs print without the models of the configuration.
    from nfq_agent.config.policy_summary import counted

    if changes or policy.changed:
        parts = [_counted(changes), *(counted(policy.lines) if policy.changed else ())]
        comment(f"# Plan for instance {instance}, {backend} backend: {', '.join(parts)}. Nothing is written.")
        _print_changes(changes)
    else:
        prose(f"Nothing to do: the kernel has the rules of instance {instance} as configured ({backend} backend).")
    for line in policy.lines:
        comment(f"# {line}")
    for line in besides:
        comment(f"# besides: {line}")


def plan_object(
    instance: str, backend: str, changes: Mapping[Family, Changes], besides: Sequence[str], policy: PolicyPlan
) -> dict[str, Any]:
    """The plan as JSON."""
    return {
        "instance": instance,
        "backend": backend,
        "changes": [
            {"family": family, "table": table, **_step_object(step)}
            for family, tables in changes.items()
            for table, steps in tables.items()
            for step in steps
        ],
        "policy": policy.lines,
        "policy_changed": policy.changed if policy.known else None,
        "besides": list(besides),
    }


def _step_object(step: NewChain | DropChain | Insert | Delete) -> dict[str, Any]:
    match step:
        case NewChain(chain):
            return {"do": "new-chain", "chain": chain}
        case DropChain(chain):
            return {"do": "delete-chain", "chain": chain}
        case Insert(rule, number):
            return {"do": "insert", "chain": rule.chain, "number": number, "rule": str(rule)}
        case Delete(rule, number):
            return {"do": "delete", "chain": rule.chain, "number": number, "rule": str(rule)}


def changes(done: Mapping[Family, Changes]) -> None:
    """What was changed."""
    if done:
        comment(f"# {_counted(done)}")
        _print_changes(done)
    else:
        wrapped("Nothing to do: the rules are as they should be.")


def _counted(changes: Mapping[Family, Changes]) -> str:
    """How many rules a change adds and removes."""
    steps = [step for tables in changes.values() for each in tables.values() for step in each]
    added, removed = (sum(isinstance(step, kind) for step in steps) for kind in (Insert, Delete))
    return f"{amount(added, 'rule', 'rules')} added, {removed} removed"


def amount(count: int, one: str, many: str) -> str:
    """A count with its noun."""
    return f"{count} {one if count == 1 else many}"


def _print_changes(changes: Mapping[Family, Changes]) -> None:
    for family, tables in changes.items():
        note(f"# {_COMMANDS[family]}")
        for line in render(tables):
            for each in _with_entries(line):
                note(each)


def rules_object(instance: str, found: Iterable[tuple[str, ListedRule]]) -> dict[str, Any]:
    """The installed rules as JSON."""
    return {
        "instance": instance,
        "rules": [
            {
                "backend": backend,
                "family": each.family,
                "table": each.table,
                "rule": str(each.installed.rule),
                "number": each.installed.number,
                "packets": each.installed.packets,
                "bytes": each.installed.bytes,
            }
            for backend, each in found
        ],
    }


def rules(instance: str, found: Sequence[tuple[str, ListedRule]]) -> None:
    """The installed rules as text: counters, then the rule as `iptables -S` prints it."""
    if not found:
        wrapped(f"No rule of instance {instance} is in the kernel.")
        return
    place = ""
    packets = max(9, *(len(str(each.installed.packets)) for _, each in found))
    size = max(9, *(len(str(each.installed.bytes)) for _, each in found))
    for backend, each in found:
        here = f"# {_COMMANDS[each.family]} -t {each.table} ({backend})"
        if here != place:
            place = here
            note(f"{here}\n# {'packets':>{packets - 2}} {'bytes':>{size}}  rule")
        first, *entries = _with_entries(str(each.installed.rule))
        note(f"{each.installed.packets:>{packets}} {each.installed.bytes:>{size}}  {first}")
        for line in entries:
            note(line)


def _with_entries(line: str) -> Iterator[str]:
    """The line of a rule, and one line for each entry of its map, a few of them."""
    match = _ENTRIES.search(line)
    if match is None:
        yield line
        return
    entries = match["entries"].split(",")
    yield f"{line[: match.start('entries')]}({amount(len(entries), 'entry', 'entries')}){line[match.end('entries') :]}"
    for entry in entries[:_ENTRIES_SHOWN]:
        key, _, verdict = entry.partition("=")
        ends = [f"{field} {value}" for field, value in zip(match["of"].split(","), key.split("/"), strict=True)]
        action, _, number = verdict.partition(".")
        yield f"    {', '.join(ends)}" + (f": {action} (rule {number})" if action else "")
    if len(entries) > _ENTRIES_SHOWN:
        yield f"    and {len(entries) - _ENTRIES_SHOWN} more; --json has all"


_MARKS: Final = {"good": ("ok", "green"), "warning": ("warning", "yellow"), "error": ("error", "red")}


def findings(found: Iterable[Finding]) -> None:
    """The findings of `doctor` as text."""
    from rich.table import Table
    from rich.text import Text

    out = console()
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(width=8)
    table.add_column(overflow="fold")
    for finding in found:
        word, colour = _MARKS[finding.level]
        table.add_row(Text(word, style=colour), Text(f"{finding.subject}: {finding.text}"))
        if finding.advice:
            # What comes after the first line stands behind the arrow.
            advice = Table.grid(padding=(0, 1, 0, 0))
            advice.add_row("->", Text(finding.advice, overflow="fold"))
            table.add_row("", advice)
    out.print(table)
