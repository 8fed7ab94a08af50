"""Rules as values: what a configuration asks of the kernel (`plan`), in the text that `iptables -S` prints. No I/O.

Whatever carries the tag `nfq-agent:INSTANCE:RULE` in its comment, and the chains `NFQA-INSTANCE-HOOK`, are ours. Nothing
else ever is.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from nfq_agent.config.models import Config, Ports, ProxyConfig, RuleConfig
from nfq_agent.mark import Kept, Mark

Family = Literal["inet", "inet6"]
FAMILIES: Final[tuple[Family, ...]] = ("inet", "inet6")
TABLES: Final = ("raw", "mangle", "nat", "filter")

# The suffix of our chain for each hook. A chain's name has 28 characters at most (XT_EXTENSION_MAXNAMELEN), so the
# longest hook is cut.
HOOK_CHAINS: Final[Mapping[str, str]] = {
    "prerouting": "PREROUTING", "input": "INPUT", "forward": "FORWARD", "output": "OUTPUT", "postrouting": "POSTROUTE",
}  # fmt: skip
_INWARD: Final = frozenset(("prerouting", "input"))
_OWNED: Final = frozenset(("output", "postrouting"))
# xt_multiport holds 15 ports, and a range takes two places (XT_MULTI_PORTS).
_MULTIPORT_PLACES: Final = 15
JUMP: Final = "jump"


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


_SYN: Final = Extension("tcp", (Option("--tcp-flags", "FIN,SYN,RST,ACK SYN"),))


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. chain: where it stands. The rest as in iptables(8); an empty string stands for `any`."""

    chain: str
    target: Extension
    matches: tuple[Extension, ...] = ()
    protocol: str = ""
    in_interface: str = ""
    out_interface: str = ""

    @property
    def tag(self) -> str:
        """The comment, or an empty string."""
        for match in self.matches:
            if match.name == "comment":
                return match.options[0].value
        return ""

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

        Raises ValueError on anything but an append, and on what no rule of ours has: addresses, fragments, a goto.
        """
        words = shlex.split(text)
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
    """A rule as the kernel has it: its place in the chain from 1, and its counters."""

    rule: Rule
    number: int
    packets: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class TableState:
    """What one table of one family holds of ours.

    chains: our chains and everything in them. jumps: our tagged rules elsewhere. held: those of our chains that somebody
    else's rule jumps to, so that they can be emptied but not deleted.
    """

    chains: Mapping[str, tuple[Installed, ...]] = field(default_factory=dict)
    jumps: tuple[Installed, ...] = ()
    held: frozenset[str] = frozenset()

    @property
    def installed(self) -> Iterator[Installed]:
        """All rules, jumps first."""
        yield from self.jumps
        for chain in self.chains.values():
            yield from chain

    def as_rules(self) -> TableRules:
        """The same as something to be wished for (what a roll-back restores)."""
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


def tag_prefix(instance: str) -> str:
    """What every tag of an instance begins with."""
    return f"nfq-agent:{instance}:"


def instance_of(chain: str) -> str | None:
    """The instance that owns a chain by its name; None for a foreign chain."""
    prefix, _, rest = chain.partition("-")
    instance, _, hook = rest.rpartition("-")
    return instance if prefix == "NFQA" and instance and hook in HOOK_CHAINS.values() else None


def plan(config: Config, uid: int | str) -> Ruleset:
    """The rules that a configuration asks for. uid: of the agent's own user, whose traffic is
    never taken; its name stands in for it where a plan is only shown and the user is yet to be made."""
    ruleset: dict[Family, dict[str, TableRules]] = {}
    for family in FAMILIES:
        tables: dict[str, dict[str, list[tuple[Rule, Kept | None]]]] = {}
        for name, rule in config.rules.items():
            if family not in rule.families:
                continue
            kept = None if rule.queue is None else config.kept(config.queue[rule.queue])
            for hook in rule.hooks:
                made = _rules(config, name, rule, family, hook)
                tables.setdefault(_table_name(config, rule), {}).setdefault(hook, []).extend((each, kept) for each in made)
        if tables:
            ruleset[family] = {table: _table(config.agent.instance, tables[table], uid) for table in tables}
    return ruleset


def _table(instance: str, hooks: Mapping[str, list[tuple[Rule, Kept | None]]], uid: int | str) -> TableRules:
    chains: dict[str, tuple[Rule, ...]] = {}
    jumps: list[Rule] = []
    for hook in HOOK_CHAINS:
        if not (rules := hooks.get(hook)):
            continue
        chain = chain_name(instance, hook)
        keeping = _keeping(instance, chain, rules)
        chains[chain] = _chain(instance, chain, hook, keeping, [rule for rule, _ in rules], uid)
        jumps.append(Rule(hook.upper(), Extension(chain), (_comment(instance, JUMP),)))
    return TableRules(chains, tuple(jumps))


# The names of the rules that keep verdicts; their counters say what was offloaded.
OFFLOAD_NEW: Final = "offload-new"
OFFLOAD_ACCEPTED: Final = "offload-accepted"
OFFLOAD_DENIED: Final = "offload-denied"


def _keeping(instance: str, chain: str, rules: list[tuple[Rule, Kept | None]]) -> list[Rule]:
    """The rules that keep the verdicts on flows, for the queues where an element offloads; they come before the others.

    A packet whose verdict holds for its flow comes round again with our mark on it (REPEAT): the mark is saved in the
    connection, and what the connection says decides, for this packet and for all that follow. `! --mark` on the queueing
    rule itself would be shorter, but xt_connmark matches no untracked packet then, which would pass unseen.
    """
    made: list[Rule] = []
    for kept in dict.fromkeys(kept for _, kept in rules if kept is not None):
        mask = f"{kept.mask:#x}"
        ours = Extension("mark", (Option("--mark", f"0x0/{mask}", negated=True),))
        save = (Option("--save-mark"), Option("--nfmask", mask), Option("--ctmask", mask))
        made.append(Rule(chain, Extension("CONNMARK", save), (ours, _comment(instance, OFFLOAD_NEW))))
        accepted = Extension("connmark", (Option("--mark", str(kept.accept)),))
        comment = _comment(instance, OFFLOAD_ACCEPTED)
        if all(other == kept for _, other in rules):
            made.append(Rule(chain, Extension("RETURN"), (accepted, comment)))
        else:
            # Another queue's traffic must still get to that queue.
            for rule, other in rules:
                if other == kept:
                    matches = (*rule.matches[:-1], accepted, comment)
                    made.append(Rule(chain, Extension("RETURN"), matches, rule.protocol, rule.in_interface, rule.out_interface))
        denied = Extension("connmark", (Option("--mark", str(kept.deny)),))
        made.append(Rule(chain, Extension("DROP"), (denied, _comment(instance, OFFLOAD_DENIED))))
    return made


def _chain(instance: str, chain: str, hook: str, keeping: list[Rule], rules: list[Rule], uid: int | str) -> tuple[Rule, ...]:
    """The rules of one own chain, with the agent's own user left out.

    A chain of several rules begins with a RETURN for that user and ends with a RETURN for everybody. A single rule says
    the exclusion itself: the baseline then has four rules a family, and some Kubernetes images take a host with ten or
    more legacy rules for one that uses them (iptables-wrappers).
    """
    # A rule for one user's packets can't meet the agent's, unless that user is the agent's.
    if len(rules) == 1:
        (rule,) = rules
        if hook in _OWNED and not any(match.name == "owner" for match in rule.matches):
            exclusion = Extension("owner", (Option("--uid-owner", str(uid), negated=True),))
            *others, comment = rule.matches
            rule = Rule(
                rule.chain, rule.target, (*others, exclusion, comment), rule.protocol, rule.in_interface,
                rule.out_interface,
            )  # fmt: skip
        return (*keeping, rule)
    head: tuple[Rule, ...] = ()
    if hook in _OWNED:
        owner = Extension("owner", (Option("--uid-owner", str(uid)),))
        head = (Rule(chain, Extension("RETURN"), (owner, _comment(instance, "own-traffic"))),)
    return (*head, *keeping, *rules, Rule(chain, Extension("RETURN"), (_comment(instance, "end"),)))


def _mark(mark: Mark) -> str:
    """As iptables prints it: without a mask that takes every bit (libxt_mark.c, print_mark)."""
    return f"{mark.value:#x}" if mark.mask == 0xFFFFFFFF else str(mark)


def _comment(instance: str, name: str) -> Extension:
    return Extension("comment", (Option("--comment", tag(instance, name)),))


def _rules(config: Config, name: str, rule: RuleConfig, family: Family, hook: str) -> list[Rule]:
    """The rules of one [rules.NAME] for one family and hook."""
    instance = config.agent.instance
    tail: list[Extension] = []
    if rule.mark is not None:
        tail.append(Extension("mark", (Option("--mark", _mark(rule.mark)),)))
    if rule.owner is not None:
        tail.append(Extension("owner", (Option("--uid-owner", str(rule.uid)),)))
    tail.append(_comment(instance, name))
    made: list[Rule] = []
    for protocol, matches in _traffic(rule, hook):
        for inward, outward in _interfaces(rule.interface or "", hook):
            chain = chain_name(instance, hook)
            if rule.proxy is not None:
                made += _capture_rules(config, rule, chain, family, protocol, matches, inward, outward, tuple(tail))
                continue
            made.append(Rule(chain, _queue_target(config, rule), (*matches, *tail), protocol, inward, outward))
    return made


def _traffic(rule: RuleConfig, hook: str) -> Iterator[tuple[str, tuple[Extension, ...]]]:
    """(protocol, matches) for each rule that the traffic of a [rules.NAME] needs in a hook."""
    if rule.all:
        yield "", ()
        return
    head = (_SYN,) if rule.tcp_syn else ()
    if rule.tcp_syn and not rule.tcp_ports:
        yield "tcp", head
    direction = _direction(rule, hook)
    for ports in _multiport(rule.tcp_ports):
        yield "tcp", (*head, Extension("multiport", (Option(direction, ports),)))
    for ports in _multiport(rule.udp_ports):
        yield "udp", (Extension("multiport", (Option(direction, ports),)),)


def _direction(rule: RuleConfig, hook: str) -> str:
    """Which port a role looks at: a server's is the destination on the way in, a client's on the way out."""
    if rule.proxy is not None:
        return "--dports"
    if rule.role in (None, "both") or hook == "forward":
        return "--ports"
    return "--dports" if (rule.role == "server") == (hook in _INWARD) else "--sports"


def _multiport(ports: Iterable[Ports]) -> Iterator[str]:
    """The ports in groups that one multiport match holds, in rising order so that a changed file's order changes nothing."""
    group: list[str] = []
    places = 0
    for each in sorted(set(ports)):
        size = 1 if each.first == each.last else 2
        if places + size > _MULTIPORT_PLACES:
            yield ",".join(group)
            group, places = [], 0
        group.append(str(each))
        places += size
    if group:
        yield ",".join(group)


def _interfaces(interface: str, hook: str) -> tuple[tuple[str, str], ...]:
    """(in, out) interface pairs; what is forwarded crosses it one way or the other."""
    if not interface:
        return (("", ""),)
    if hook == "forward":
        return ((interface, ""), ("", interface))
    return ((interface, ""),) if hook in _INWARD else (("", interface),)


def _queue_target(config: Config, rule: RuleConfig) -> Extension:
    queue = config.queue[rule.queue or ""]
    numbers = queue.numbers
    if len(numbers) > 1:
        options = [Option("--queue-balance", f"{numbers[0]}:{numbers[-1]}")]
    else:
        options = [Option("--queue-num", str(numbers[0]))]
    if queue.bypass:
        options.append(Option("--queue-bypass"))
    if queue.cpu_fanout:
        options.append(Option("--queue-cpu-fanout"))
    return Extension("NFQUEUE", tuple(options))


def _table_name(config: Config, rule: RuleConfig) -> str:
    """The table of a rule: TPROXY is valid in mangle only (xt_TPROXY.c)."""
    return "mangle" if rule.proxy is not None and config.proxy[rule.proxy].capture == "tproxy" else rule.table_name


def _capture_rules(
    config: Config, rule: RuleConfig, chain: str, family: Family, protocol: str, matches: tuple[Extension, ...],
    inward: str, outward: str, tail: tuple[Extension, ...],
) -> Iterator[Rule]:  # fmt: skip
    """The rules that lead connections to a proxy, after those that leave some of them alone."""
    proxy = config.proxy[rule.proxy or ""]
    port = _listener_port(proxy, family)
    if port is None:
        return
    leave = Extension("RETURN")
    # Who calls a listener by its own address is told so by the proxy; to lead it there in a circle helps nobody.
    own = sorted({each.port for every in config.proxy.values() for each in every.listen})
    for ports in _multiport(Ports(each, each) for each in own if any(p.first <= each <= p.last for p in rule.tcp_ports)):
        local = Extension("addrtype", (Option("--dst-type", "LOCAL"),))
        listeners = Extension("multiport", (Option("--dports", ports),))
        yield Rule(chain, leave, (listeners, local, *tail), protocol, inward, outward)
    for network in sorted(each for each in proxy.exclude if each.version == (6 if family == "inet6" else 4)):
        there = Extension("iprange", (Option("--dst-range", f"{network[0]}-{network[-1]}"),))
        yield Rule(chain, leave, (*matches, there, *tail), protocol, inward, outward)
    # Connections that run by now go on as they are: led to the proxy, which knows nothing of them, they would be reset. Also by
    # REDIRECT: a first rule of table nat wakes connection tracking, which takes their next packet for the first of a new one.
    matches = (_SYN, *matches)
    if proxy.capture == "redirect":
        target = Extension("REDIRECT", (Option("--to-ports", str(port)),))
    else:
        address = "::" if family == "inet6" else "0.0.0.0"
        mark = Option("--tproxy-mark", str(proxy.tproxy_mark))
        target = Extension("TPROXY", (Option("--on-port", str(port)), Option("--on-ip", address), mark))
        # What belongs to a connection of the proxy already: also the answers to a client's address that it speaks with.
        own_socket = Extension("socket", (Option("--transparent"),))
        keep = Extension("MARK", (Option("--set-xmark", str(proxy.tproxy_mark)),))
        yield Rule(chain, keep, (own_socket, *tail), "tcp")
    yield Rule(chain, target, (*matches, *tail), protocol, inward, outward)


def _listener_port(proxy: ProxyConfig, family: Family) -> int | None:
    """The first listener of a family. A `[::]` listener with no IPv4 one on its port takes both."""
    v4 = {each.port for each in proxy.listen if ":" not in each.host}
    for each in proxy.listen:
        if (":" in each.host) == (family == "inet6"):
            return each.port
    if family == "inet" and proxy.capture == "redirect":
        return next((each.port for each in proxy.listen if each.host == "::" and each.port not in v4), None)
    return None


def parked(ruleset: Ruleset) -> Ruleset:
    """What stays while proxies drain: nothing new is led to them, what was led there stays connected.

    The last rule that needs connection tracking takes the NAT of running connections with it when it goes
    (nf_ct_netns_put() in net/netfilter/nf_conntrack_proto.c), so chains of table nat stay, with no jump to them. Of TPROXY,
    the rule for connections that are there stays. Everything else goes.
    """
    kept: dict[Family, dict[str, TableRules]] = {}
    for family, tables in ruleset.items():
        for table, rules in tables.items():
            if table == "nat":
                kept.setdefault(family, {})[table] = TableRules(rules.chains)
                continue
            chains = {
                chain: tuple(rule for rule in inside if any(match.name == "socket" for match in rule.matches))
                for chain, inside in rules.chains.items()
                if any(rule.target.name == "TPROXY" for rule in inside)
            }
            if chains:
                jumps = tuple(jump for jump in rules.jumps if jump.target.name in chains)
                kept.setdefault(family, {})[table] = TableRules(chains, jumps)
    return kept


def beside(ruleset: Ruleset, standing: Ruleset) -> Ruleset:
    """`ruleset`, and what of `standing` (what `parked` leaves) it lacks: chains, and rules in those that both have.

    Of table nat, chains alone: in one that is jumped to, an old rule would lead new connections.
    """
    joined: dict[Family, dict[str, TableRules]] = {family: dict(tables) for family, tables in ruleset.items()}
    for family, tables in standing.items():
        for table, rules in tables.items():
            there = joined.setdefault(family, {}).get(table, TableRules())
            chains = dict(there.chains)
            for chain, inside in rules.chains.items():
                if chain not in chains:
                    chains[chain] = inside
                elif table != "nat":
                    chains[chain] = (*(rule for rule in inside if rule not in chains[chain]), *chains[chain])
            jumps = tuple(jump for jump in rules.jumps if jump.target.name not in there.chains)
            joined[family][table] = TableRules(chains, (*there.jumps, *jumps))
    return joined


def fail_closed(state: Mapping[str, TableState]) -> dict[str, TableRules]:
    """What stays after a failure: rules without `--queue-bypass`, which keep traffic out while nobody judges it.

    Told from the rules themselves, so that it holds with no configuration at hand. Chains that hold none such go whole.
    """
    kept: dict[str, TableRules] = {}
    for table, there in state.items():
        chains: dict[str, tuple[Rule, ...]] = {}
        for name, installed in there.chains.items():
            rules = tuple(found.rule for found in installed if not _fails_open(found.rule))
            if any(rule.target.name == "NFQUEUE" for rule in rules):
                chains[name] = rules
        jumps = tuple(found.rule for found in there.jumps if found.rule.target.name in chains)
        if chains:
            kept[table] = TableRules(chains, jumps)
    return kept


def _fails_open(rule: Rule) -> bool:
    bypass = any(option.name == "--queue-bypass" for option in rule.target.options)
    return rule.target.name in ("REDIRECT", "TPROXY") or (rule.target.name == "NFQUEUE" and bypass)
