"""A kernel's rules in memory: the same doors as the real backends, and `restore` and `save` for the world beside the agent."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from nfq_agent.rules.diff import Applied, Change, Delete, DropChain, Insert, NewChain, apply_and_verify
from nfq_agent.rules.foreign import InFront
from nfq_agent.rules.model import (
    FAMILIES,
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

BUILT_IN = {
    "raw": ("PREROUTING", "OUTPUT"),
    "mangle": ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"),
    "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
    "filter": ("INPUT", "FORWARD", "OUTPUT"),
}


class Entry:
    """A rule with its counters."""

    def __init__(self, rule: Rule, packets: int = 0, size: int = 0) -> None:
        self.rule, self.packets, self.bytes = rule, packets, size


class FakeTable:
    """Chains in order, each a list of rules; built-in ones have a policy with counters."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.chains: dict[str, list[Entry]] = {chain: [] for chain in BUILT_IN[name]}
        self.policies = dict.fromkeys(BUILT_IN[name], ("ACCEPT", 0, 0))

    def copy(self) -> FakeTable:
        twin = FakeTable(self.name)
        twin.chains = {name: list(entries) for name, entries in self.chains.items()}
        twin.policies = dict(self.policies)
        return twin

    def carry_out(self, line: str) -> None:
        """One line of `iptables-restore`. Raises RuleError as the kernel would refuse."""
        counters = re.match(r"\[(\d+):(\d+)\] (.*)", line)
        packets, size, line = (int(counters[1]), int(counters[2]), counters[3]) if counters else (0, 0, line)
        if line.startswith(":"):
            chain, policy, numbers = line[1:].split()
            self.chains.setdefault(chain, [])
            if policy != "-":
                first, second = numbers.strip("[]").split(":")
                self.policies[chain] = (policy, int(first), int(second))
            return
        command, chain, *rest = line.split(" ", 2)
        text = rest[0] if rest else ""
        match command:
            case "-N":
                if chain in self.chains:
                    raise RuleError(f"chain {chain} exists")
                self.chains[chain] = []
            case "-X":
                if self.chains[chain] or any(e.rule.target.name == chain for es in self.chains.values() for e in es):
                    raise RuleError(f"chain {chain} is in use")
                del self.chains[chain]
            case "-A":
                self.check(parse(chain, text))
                self.chains[chain].append(Entry(parse(chain, text), packets, size))
            case "-I":
                number, _, spec = text.partition(" ")
                if not number.isdecimal():
                    number, spec = "1", text
                self.check(parse(chain, spec))
                self.chains[chain].insert(int(number) - 1, Entry(parse(chain, spec), packets, size))
            case "-D" if text.isdecimal():
                del self.chains[chain][int(text) - 1]
            case "-D":
                index = [entry.rule for entry in self.chains[chain]].index(parse(chain, text))
                del self.chains[chain][index]
            case _:
                raise ValueError(line)

    def check(self, rule: Rule) -> None:
        if rule.chain not in self.chains:
            raise RuleError(f"no chain {rule.chain}")
        if rule.target.name.startswith("NFQA-") and rule.target.name not in self.chains:
            raise RuleError(f"no chain {rule.target.name}")
        if rule.target.name == "REDIRECT" and self.name != "nat":
            raise RuleError("REDIRECT is valid in table nat only")


def parse(chain: str, spec: str) -> Rule:
    """The rule, or one that no configuration makes if it is not of our kind."""
    try:
        return Rule.parse(f"-A {chain} {spec}")
    except ValueError:
        return Rule(chain, Extension("?", (Option("--undecoded", spec),)))


def text_of(rule: Rule) -> str:
    """The rule as it was written."""
    if rule.target.name == "?":
        return f"-A {rule.chain} {rule.target.options[0].value}"
    return str(rule)


class FakeKernel:
    """Both families' tables. `commits` counts what was written, `fail_next` makes that many commits fail."""

    def __init__(self) -> None:
        self.tables: dict[Family, dict[str, FakeTable]] = {"inet": {}, "inet6": {}}
        self.commits = 0
        self.fail_at: int | None = None
        self.misread: Rule | None = None

    def table(self, family: Family, name: str) -> FakeTable:
        """A table; asking makes it present."""
        return self.tables[family].setdefault(name, FakeTable(name))

    def restore(self, family: Family, text: str) -> None:
        """`iptables-restore --noflush -c`"""
        table: FakeTable | None = None
        for line in text.splitlines():
            if line.startswith("*"):
                table = self.table(family, line[1:])
            elif line != "COMMIT" and table is not None:
                table.carry_out(line)

    def save(self, family: Family) -> list[str]:
        """`iptables-save -c`, without the remarks."""
        lines = []
        for name, table in self.tables[family].items():
            lines.append(f"*{name}")
            for chain in table.chains:
                policy, packets, size = table.policies.get(chain, ("-", 0, 0))
                lines.append(f":{chain} {policy} [{packets}:{size}]")
            for entries in table.chains.values():
                lines += [f"[{entry.packets}:{entry.bytes}] {text_of(entry.rule)}" for entry in entries]
            lines.append("COMMIT")
        return lines


class FakeHost:
    """A backend.RuleHost over a FakeKernel."""

    name = "fake"
    notice = ""
    lists = False
    descriptors: tuple[int, ...] = ()
    closed = False
    lock_seconds = 30.0

    def __init__(self, kernel: FakeKernel, instance: str) -> None:
        self.kernel, self.instance = kernel, instance

    def present(self, family: Family) -> frozenset[str] | None:
        return frozenset(self.kernel.tables[family])

    def read(self, family: Family) -> dict[str, TableState]:
        return _Session(self, family).read()

    @property
    def families(self) -> tuple[Family, ...]:
        return FAMILIES

    def sign(self) -> object:
        return None

    def in_front(self, family: Family, found: Mapping[str, TableState]) -> list[InFront]:
        return []

    def instances(self, family: Family) -> frozenset[str]:
        names = (instance_of(chain) for table in self.kernel.tables[family].values() for chain in table.chains)
        return frozenset(name for name in names if name is not None)

    def apply(self, family: Family, desired: Mapping[str, TableRules]) -> Applied:
        return apply_and_verify(_Session(self, family), desired)

    def apply_all(self, desired: Mapping[Family, Mapping[str, TableRules]], undo: bool = True) -> dict[Family, Applied]:
        done: dict[Family, Applied] = {}
        errors: list[RuleError] = []
        for family, rules in desired.items():
            try:
                done[family] = self.apply(family, rules)
            except RuleError as error:
                errors.append(error)
        if errors and undo:
            for family, applied in done.items():
                self.apply(family, {name: state.as_rules() for name, state in applied.before.items()})
        if errors:
            raise errors[0]
        return done

    def close(self) -> None:
        self.closed = True


class _Session:
    def __init__(self, host: FakeHost, family: Family) -> None:
        self.kernel, self.family = host.kernel, family
        self.chains, self.tag = own_chains(host.instance), tag_prefix(host.instance)
        self.found: dict[Rule, Entry] = {}

    def read(self) -> dict[str, TableState]:
        return {name: self._state(table) for name, table in self.kernel.tables[self.family].items()}

    def _state(self, table: FakeTable) -> TableState:
        chains: dict[str, list[Installed]] = {}
        for chain, entries in table.chains.items():
            chains[chain] = []
            for number, entry in enumerate(entries, 1):
                self.found.setdefault(entry.rule, entry)
                if chain not in self.chains or entry.rule != self.kernel.misread:
                    chains[chain].append(Installed(entry.rule, number, entry.packets, entry.bytes))
        return TableState.of(chains, self.chains, self.tag)

    def commit(self, table: str, changes: Sequence[Change]) -> None:
        self.kernel.commits += 1
        if self.kernel.commits == self.kernel.fail_at:
            raise RuleError("the kernel said no")
        present = self.kernel.table(self.family, table)
        copy = present.copy()
        for change in changes:
            match change:
                case NewChain(chain):
                    copy.carry_out(f"-N {chain}")
                case DropChain(chain):
                    copy.carry_out(f"-X {chain}")
                case Insert(rule, number):
                    copy.check(rule)
                    entry = self.found.get(rule)
                    entry = Entry(rule, entry.packets, entry.bytes) if entry else Entry(rule)
                    copy.chains[rule.chain].insert(number - 1, entry)
                case Delete(rule, number):
                    assert copy.chains[rule.chain][number - 1].rule == rule
                    del copy.chains[rule.chain][number - 1]
        self.kernel.tables[self.family][table] = copy
