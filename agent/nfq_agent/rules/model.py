"""Netfilter rules as values, in the text that `iptables -S` prints. No I/O.

A rule whose comment begins with the tag `nfq-agent:INSTANCE:`, and the chains `NFQA-INSTANCE-HOOK`, belong to that instance.
Everything else belongs to others.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

Family = Literal["inet", "inet6"]
FAMILIES: Final[tuple[Family, ...]] = ("inet", "inet6")
TABLES: Final = ("raw", "mangle", "nat", "filter")

# The suffix of our chain for each hook. A chain's name has 28 characters at most (XT_EXTENSION_MAXNAMELEN), so the
# longest hook is cut.
HOOK_CHAINS: Final[Mapping[str, str]] = {
    "prerouting": "PREROUTING", "input": "INPUT", "forward": "FORWARD", "output": "OUTPUT", "postrouting": "POSTROUTE",
}  # fmt: skip
JUMP: Final = "jump"
# The name of the rule that leaves out the packets of the agent's own user.
OWN_TRAFFIC: Final = "own-traffic"
# The names of the rules that keep verdicts; their counters say what was offloaded.
OFFLOAD_NEW: Final = "offload-new"
OFFLOAD_ACCEPTED: Final = "offload-accepted"
OFFLOAD_DENIED: Final = "offload-denied"
# The name of the rules that take the mark away from a connection that begins on the ends of one before.
OFFLOAD_BEGUN: Final = "offload-begun"
# The name of the rules that mark the connections of an owner.
OWNER_NEW: Final = "owner-new"


# The match and the target that hold many rules of a policy (rules.entries): `--of` the fields, and `--list` or `--map`.
ENTRIES: Final = "entries"
VERDICTS: Final = "VERDICTS"
# The matches on one port or range of ports, and on one range of addresses, that are compared, and not looked up in a set.
PORT: Final = "port"
RANGE: Final = "range"
# The prefix of the name of a rule that only counts the connections that should be redirected to a proxy's port, which follows.
EXPECTED: Final = ".expected-"
# The prefix of the name of a rule that accepts the connections of a proxy in hook INPUT; the proxy's name follows. No name of a
# configuration has a dot.
ACCEPTED: Final = "accept."
# The prefix of the numbers of control groups in a further comment of a rule.
GROUPS: Final = "cgroup-"
# The match on the socket's control group, or the one above it, at a `--level`: one of `--numbers`, or any. While groups are not
# known (rules.groups), `--owner` says which are meant (rules.group_tree).
AT_LEVEL: Final = "group"


class RuleError(Exception):
    """The kernel's rules could not be read, or are not as they should be after a change."""


class Option(NamedTuple):
    """`--name value`, `! --name value` if negated; the value is empty for a bare switch."""

    name: str
    value: str = ""
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Extension:
    """A match (`-m name ...`) or a target (`-j name ...`) with its options in the order that iptables prints them."""

    name: str
    options: tuple[Option, ...] = ()


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. chain: the chain that it is in. The rest as in iptables(8); an empty string stands for `any`."""

    chain: str
    target: Extension
    matches: tuple[Extension, ...] = ()
    protocol: str = ""
    in_interface: str = ""
    out_interface: str = ""

    @property
    def tag(self) -> str:
        """The last comment, or an empty string."""
        for match in reversed(self.matches):
            if match.name == "comment":
                return match.options[0].value
        return ""

    @property
    def group_numbers(self) -> tuple[int, ...]:
        """The numbers of the control groups in its matches, in their order; see rules.groups."""
        for match in self.matches:
            if match.name == "comment" and match.options[0].value.startswith(GROUPS):
                return tuple(map(int, match.options[0].value.removeprefix(GROUPS).split("-")))
        return ()

    @property
    def queues(self) -> range:
        """The queue numbers it sends packets to; empty if it sends none."""
        if self.target.name == "NFQUEUE":
            for option in self.target.options:
                if option.name in ("--queue-num", "--queue-balance"):
                    first, _, last = option.value.partition(":")
                    return range(int(first), int(last or first) + 1)
        return range(0)

    @property
    def spec(self) -> str:
        """The rule without its chain, as `iptables -S` prints it."""
        words: list[str] = []
        for option, value in (("-i", self.in_interface), ("-o", self.out_interface), ("-p", self.protocol)):
            if value:
                # A negated one is kept with its mark: `! eth0`.
                words += ["!", option, value[2:]] if value.startswith("! ") else [option, value]
        for match in self.matches:
            words += ["-m", match.name, *_option_words(match.options)]
        if self.target.name:
            words += ["-j", self.target.name, *_option_words(self.target.options)]
        return " ".join(words)

    def __str__(self) -> str:
        return f"-A {self.chain} {self.spec}".rstrip()

    @classmethod
    def parse(cls, text: str) -> Rule:
        """The rule that `iptables -S` prints as `text`.

        Raises ValueError on anything but an append, and on parts that no rule of ours has: addresses, fragments, a goto.
        """
        words = _words(text)
        if len(words) < 2 or words[0] != "-A":
            raise ValueError(f"not a rule: {text}")
        fields = {"-i": "", "-o": "", "-p": ""}
        matches: list[Extension] = []
        target: Extension | None = None
        options: list[Option] = []
        name = ""
        is_target = False
        negated = False

        def close() -> None:
            nonlocal target
            if name:
                extension = Extension(name, tuple(options))
                if is_target:
                    target = extension
                else:
                    matches.append(extension)
            options.clear()

        index = 2
        while index < len(words):
            word = words[index]
            index += 1
            following = words[index] if index < len(words) else ""
            if word == "!":
                negated = True
                continue
            if word in fields and not name:
                fields[word] = ("! " if negated else "") + following
                index += 1
            elif word in ("-m", "-j"):
                close()
                name, is_target = following, word != "-m"
                index += 1
            elif word.startswith("--") and name:
                values: list[str] = []
                while index < len(words) and words[index] != "!" and not words[index].startswith("-"):
                    values.append(words[index])
                    index += 1
                options.append(Option(word, " ".join(values), negated))
            else:
                raise ValueError(f"unexpected {word!r} in rule: {text}")
            negated = False
        close()
        if target is None:
            target = Extension("")
        return cls(words[1], target, tuple(matches), fields["-p"], fields["-i"], fields["-o"])


def _words(text: str) -> list[str]:
    """The words as a shell takes them. Those of a rule of ours, which may be long, need no shell's rules."""
    words = text.split()
    quoted = [word for word in words if '"' in word]
    if "'" in text or "\\" in text or any(word.count('"') != 2 or '"' in word.strip('"') for word in quoted):
        return shlex.split(text)
    return [word.strip('"') for word in words]


def _option_words(options: Iterable[Option]) -> Iterator[str]:
    for option in options:
        if option.negated:
            yield "!"
        yield option.name
        if option.value:
            # iptables quotes a comment, and nothing else that we write.
            yield f'"{option.value}"' if option.name == "--comment" else option.value


@dataclass(frozen=True, slots=True)
class TableRules:
    """What one table of one family should hold of ours: own chains in full, and the tagged jumps to them."""

    chains: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict)
    jumps: tuple[Rule, ...] = ()

    @property
    def rules(self) -> Iterator[Rule]:
        """All rules, jumps first."""
        yield from self.jumps
        for chain in self.chains.values():
            yield from chain


Ruleset = Mapping[Family, Mapping[str, TableRules]]


@dataclass(frozen=True, slots=True)
class Installed:
    """A rule as the kernel has it: its place in the chain from 1, and its counters.

    handle: the kernel's own number for it, which stays when its list of ports changes, as do its counters; 0 where rules have
    none (xtables). by_number: packets by the number of the policy's rule, where the target is a map of many.
    """

    rule: Rule
    number: int
    packets: int = 0
    bytes: int = 0
    handle: int = 0
    by_number: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class TableState:
    """What one table of one family holds of ours.

    chains: our chains and everything in them. jumps: our tagged rules elsewhere. referenced: those of our chains that a
    foreign rule jumps to, so that they can be emptied but not deleted.
    """

    chains: Mapping[str, tuple[Installed, ...]] = field(default_factory=dict)
    jumps: tuple[Installed, ...] = ()
    referenced: frozenset[str] = frozenset()

    @classmethod
    def of(cls, chains: Mapping[str, Sequence[Installed]], own: frozenset[str], tag: str) -> TableState:
        """Pick out of all rules of a table, by chain, those of one instance. own: the names of its chains. tag: of its rules."""
        elsewhere = [each for chain, rules in chains.items() if chain not in own for each in rules]
        return cls(
            {chain: tuple(rules) for chain, rules in chains.items() if chain in own},
            tuple(each for each in elsewhere if each.rule.tag.startswith(tag)),
            frozenset(each.rule.target.name for each in elsewhere if not each.rule.tag.startswith(tag)) & own,
        )

    @property
    def installed(self) -> Iterator[Installed]:
        """All rules, jumps first."""
        yield from self.jumps
        for chain in self.chains.values():
            yield from chain

    def as_rules(self) -> TableRules:
        """The same as desired rules (which a rollback restores)."""
        return TableRules(
            {name: tuple(found.rule for found in rules) for name, rules in self.chains.items()},
            tuple(found.rule for found in self.jumps),
        )


def chain_name(instance: str, hook: str) -> str:
    """The name of an instance's own chain for a hook."""
    return f"NFQA-{instance}-{HOOK_CHAINS[hook]}"


def own_chains(instance: str) -> frozenset[str]:
    """The names of all chains that an instance can have."""
    return frozenset(chain_name(instance, hook) for hook in HOOK_CHAINS)


def tag(instance: str, rule: str) -> str:
    """The comment that a rule of ours carries."""
    return f"nfq-agent:{instance}:{rule}"


def comment_match(instance: str, name: str) -> Extension:
    """The match that carries the tag of a rule."""
    return Extension("comment", (Option("--comment", tag(instance, name)),))


def tag_prefix(instance: str) -> str:
    """The beginning of every tag of an instance."""
    return f"nfq-agent:{instance}:"


def instance_of(chain: str) -> str | None:
    """The instance that owns a chain by its name; None for a foreign chain."""
    prefix, _, rest = chain.partition("-")
    instance, _, hook = rest.rpartition("-")
    return instance if prefix == "NFQA" and instance and hook in HOOK_CHAINS.values() else None
