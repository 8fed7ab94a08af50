"""Rules through the nft kind of iptables: `iptables-nft-save`, and `iptables-nft-restore --noflush`, for hosts without legacy
xtables and for admins who want one view of all rules.

Never without --noflush, and never an nft table deleted: either loses every packet that waits in a queue. A rule in a chain
that is not ours goes by its text and never by its number, which may be another's by then.
"""

from __future__ import annotations

import itertools
import os
import random
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from nfq_agent.rules.diff import Busy, Change, Delete, DropChain, Insert, NewChain, Settled, settle
from nfq_agent.rules.model import (
    TABLES,
    Extension,
    Family,
    Installed,
    Option,
    Rule,
    RuleError,
    TableRules,
    TableState,
    instance_of,
    own_chains,
    tag_prefix,
)

_TOOLS: Final[Mapping[Family, str]] = {"inet": "iptables-nft", "inet6": "ip6tables-nft"}
_PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"
_SECONDS: Final = 60
_PATIENCE: Final = 3.0


@dataclass(frozen=True, slots=True)
class Facts:
    """What there is of the nft kind of iptables. `problem`: why it can't be used; None if it can."""

    version: str
    problem: str | None


def probe() -> Facts:
    """Whether the tools are there and the kernel answers them; nothing is written."""
    try:
        version = _run("iptables-nft", "--version").strip()
        for tool in _TOOLS.values():
            _tool(f"{tool}-save")
            _tool(f"{tool}-restore")
        _run("iptables-nft-save", "-t", "mangle")
    except RuleError as error:
        return Facts("", str(error))
    return Facts(version, None)


def require() -> None:
    """Raise RuleError unless the tools can be used."""
    if (problem := probe().problem) is not None:
        raise RuleError(f"the nft backend can't be used: {problem}")


def _tool(name: str) -> str:
    if (path := shutil.which(name) or shutil.which(name, path=_PATH)) is None:
        raise RuleError(f"{name} is not installed; it is part of the package iptables")
    return path


def _run(name: str, *arguments: str, text: str | None = None) -> str:
    """The standard output of a tool. Raises RuleError with what it said if it fails."""
    try:
        done = subprocess.run(
            [_tool(name), *arguments], input=text, stdin=subprocess.DEVNULL if text is None else None,
            capture_output=True, text=True, errors="surrogateescape", timeout=_SECONDS, env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuleError(f"{name}: {error}") from error
    if done.returncode != 0:
        raise RuleError(f"{name}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


class NftHost:
    """This instance's rules in the tables of the nft kind of iptables."""

    name = "nft"

    def __init__(self, instance: str, notice: str = "") -> None:
        self.instance = instance
        self.notice = notice
        # nf_tables has no such lock: its transactions are atomic.
        self.lock_seconds = 0.0

    def present(self, family: Family) -> frozenset[str] | None:
        """The names of the tables that are present. Raises RuleError."""
        return frozenset(_saved(family))

    def read(self, family: Family) -> dict[str, TableState]:
        """What each table that is present holds of this instance. Raises RuleError."""
        return _Session(family, self.instance).read()

    def instances(self, family: Family) -> frozenset[str]:
        """The instances that own chains."""
        chains = (line[1:].partition(" ")[0] for lines in _saved(family).values() for line in lines if line[0] == ":")
        return frozenset(name for chain in chains if (name := instance_of(chain)) is not None)

    def apply(self, family: Family, desired: Mapping[str, TableRules]) -> Settled:
        """Make the rules the desired ones, in every present table. Raises RuleError."""
        return settle(_Session(family, self.instance), desired)

    def begin(self, family: Family, desired: Mapping[str, TableRules]) -> Callable[[], Settled]:
        """The same, when what is returned is called."""
        return partial(self.apply, family, desired)


def _saved(family: Family) -> dict[str, list[str]]:
    """The lines of `iptables-nft-save` by table; each begins with `:` or `[`."""
    command = f"{_TOOLS[family]}-save"
    try:
        return dict(_tables(_run(command, "-c")))
    except RuleError:
        # One table that others wrote natively spoils the whole listing; it is not one that we could use.
        found: dict[str, list[str]] = {}
        problems = []
        for table in TABLES:
            try:
                found.update(_tables(_run(command, "-c", "-t", table)))
            except RuleError as error:
                problems.append(error)
        if not found:
            raise problems[0] from None
        return found


def _tables(text: str) -> Iterator[tuple[str, list[str]]]:
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("*"):
            lines = []
            if (name := line[1:]) in TABLES:
                yield name, lines
        elif line.startswith((":", "[")):
            lines.append(line)


class _Session:
    """One family's tables; see diff.Session. The kernel takes each table's changes whole or not at all."""

    def __init__(self, family: Family, instance: str) -> None:
        self._restore = f"{_TOOLS[family]}-restore"
        self._family: Family = family
        self._chains = own_chains(instance)
        self._tag = tag_prefix(instance)
        self._found: Mapping[str, TableState] = {}
        # Rules as they were found: their text and their counters, should they have to be put back.
        self._texts: dict[Rule, tuple[str, str]] = {}
        self._deadline = time.monotonic() + _PATIENCE

    def read(self) -> dict[str, TableState]:
        """What every present table holds of the instance."""
        found = {table: self._state(lines) for table, lines in sorted(_saved(self._family).items())}
        self._found = found
        return found

    def _state(self, lines: Sequence[str]) -> TableState:
        chains: dict[str, list[Installed]] = {}
        jumps: list[Installed] = []
        held: set[str] = set()
        numbers: dict[str, int] = {}
        for line in lines:
            if line[0] == ":":
                if (name := line[1:].partition(" ")[0]) in self._chains:
                    chains[name] = []
                continue
            counters, _, text = line.partition(" ")
            chain = text.split(" ", 2)[1]
            number = numbers[chain] = numbers.get(chain, 0) + 1
            if chain in self._chains:
                chains[chain].append(self._installed(chain, number, counters, text))
            elif "NFQA-" in line or self._tag in line:
                if self._is_tagged(text):
                    jumps.append(self._installed(chain, number, counters, text))
                else:
                    held |= self._chains & _targets(text)
        return TableState({name: tuple(rules) for name, rules in chains.items()}, tuple(jumps), frozenset(held))

    def _is_tagged(self, text: str) -> bool:
        words = _words(text)
        return any(first == "--comment" and second.startswith(self._tag) for first, second in itertools.pairwise(words))

    def _installed(self, chain: str, number: int, counters: str, text: str) -> Installed:
        packets, _, size = counters.strip("[]").partition(":")
        try:
            rule = Rule.parse(text)
            if shlex.split(str(rule)) != shlex.split(text):
                raise ValueError("not what was read")
        except ValueError:
            # Nobody wishes for such a rule, so it goes.
            rule = Rule(chain, Extension("?", (Option("--undecoded", text),)))
        self._texts.setdefault(rule, (text.split(" ", 2)[2] if text.count(" ") > 1 else "", counters))
        return Installed(rule, number, int(packets), int(size))

    def commit(self, table: str, changes: Sequence[Change]) -> None:
        """Carry out the changes of one table in one transaction. Raises Busy if somebody else was quicker, else RuleError."""
        text = "\n".join((f"*{table}", *map(self._line, changes), "COMMIT", ""))
        before = self._found.get(table)
        try:
            _run(self._restore, "--noflush", "--counters", "--wait", text=text)
        except RuleError as error:
            if time.monotonic() < self._deadline and self.read().get(table) != before:
                time.sleep(random.uniform(0.001, 0.02))
                raise Busy(f"table {table} changed meanwhile: {error}") from error
            raise RuleError(f"table {table}: {error}\n{text}") from error

    def _line(self, change: Change) -> str:
        match change:
            case NewChain(chain):
                return f"-N {chain}"
            case DropChain(chain):
                return f"-X {chain}"
            case Insert(rule, number):
                spec, counters = self._texts.get(rule, (rule.spec, "[0:0]"))
                return f"{counters} -I {rule.chain} {number} {spec}"
            case Delete(rule, number):
                if rule.chain in self._chains:
                    return f"-D {rule.chain} {number}"
                spec, _ = self._texts.get(rule, (rule.spec, ""))
                return f"-D {rule.chain} {spec}"


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:
        return text.split()


def _targets(text: str) -> frozenset[str]:
    """Where a rule jumps or goes."""
    words = _words(text)
    return frozenset(second for first, second in itertools.pairwise(words) if first in ("-j", "-g"))
