"""Many leading rules of a policy as one map of the kernel, which is looked up once where each rule would be asked. No I/O."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Final, NamedTuple

from nfq_agent.rules.entries import MapEntry, apart, entries_of, in_order, shape, words
from nfq_agent.rules.model import ENTRIES, OWN_TRAFFIC, PORT, RANGE, VERDICTS, Extension, Family, Option, Rule, TableRules
from nfq_agent.rules.selection import Selected

if TYPE_CHECKING:
    from nfq_agent.policy_options import RuleOptions

# Where the worker logs drops, it gets some of the packets that a rule drops: as many a second as it writes lines.
SAMPLE: Final = Extension("limit", (Option("--limit", "100/sec"), Option("--limit-burst", "100")))
# The rules that send packets to a queue.
Ask = Callable[[Selected], Iterable[Rule]]
# As many rules of one shape, one behind the other, become a map.
_LEAST_IN_MAP: Final = 8
_MOST_ENTRIES: Final = 16384
_PORTS: Final = frozenset(("sport", "dport"))
_OPTIONS: Final = {"src": "--src-range", "dst": "--dst-range", "sport": "--sports", "dport": "--dports"}
# The share of all values of a field up to which its entries are asked for by their ends first.
_NARROW: Final = 1 / 8


class Leading(NamedTuple):
    """A rule of a policy, or its default, that the kernel applies. number: in its policy, from 1; 0 for the default."""

    number: int
    label: str
    action: str
    conditions: RuleOptions | None


def all_passes(rules: Sequence[Leading | PolicyMap]) -> bool:
    """Whether these are no more than a default that accepts."""
    return len(rules) == 1 and isinstance(rules[0], Leading) and rules[0].conditions is None and rules[0].action == "accept"


def compared(matches: Iterable[Extension], ranges: bool = False) -> tuple[Extension, ...]:
    """The matches, with a list of one port compared: a look-up in a set of one takes 90 ns, a comparison a few.

    ranges: a list of one range of addresses too. The text of a rule has no room for many of them, or for those of IPv6.
    """
    names = {"multiport": PORT, "iprange": RANGE} if ranges else {"multiport": PORT}
    return tuple(
        Extension(names[match.name], match.options) if match.name in names and "," not in match.options[0].value else match
        for match in matches
    )


class PolicyMap(NamedTuple):
    """Rules of one shape, no two of which meet the same packet. first, last: their numbers."""

    first: int
    last: int
    fields: tuple[str, ...]
    entries: tuple[MapEntry, ...]


def with_maps(rules: Sequence[Leading], family: Family) -> Iterator[Leading | PolicyMap]:
    """The rules in their order, many of one shape as a map."""
    for fields, group in itertools.groupby(rules, lambda each: () if each.conditions is None else shape(each.conditions)):
        same = list(group)
        made: list[Sequence[MapEntry]] = []
        if fields and len(same) >= _LEAST_IN_MAP:
            each_of = [
                entries_of(each.conditions, each.action, each.number, family) for each in same if each.conditions is not None
            ]
            made = [each for each in each_of if each is not None]
        if len(made) != len(same) or sum(map(len, made)) > _MOST_ENTRIES:
            yield from same
            continue
        for begin, end in apart(made):
            part = same[begin:end]
            if len(part) >= _LEAST_IN_MAP:
                entries = in_order(itertools.chain.from_iterable(made[begin:end]))
                yield PolicyMap(part[0].number, part[-1].number, fields, entries)
            else:
                yield from part


def mapped(  # one for each thing that differs
    step: PolicyMap, comment: Extension, default: Extension | None, chain: str, family: Family, what: Selected,
    ask: Ask | None, first: Ask | None,
) -> Iterator[Rule]:  # fmt: skip
    """The rules that look up a map, which has entries. ask: where some of what is dropped goes to the queue. first: where first
    packets do. default: the comment of the default, where it accepts all that has no entry, and no rule is in between.
    """
    of = Option("--of", ",".join(step.fields))
    if default is not None and first is None and (narrow := _narrow(step, family, _asks_ports(what))) is not None:
        yield what._replace(matches=(*what.matches, narrow)).rule(chain, Extension("RETURN"), default)

    def listed(entries: Iterable[MapEntry], negated: bool = False) -> Selected:
        bare = [each._replace(action="", number=0) for each in entries]
        found = Extension(ENTRIES, (of, Option("--list", words(in_order(bare), step.fields, family), negated)))
        return what._replace(matches=(*what.matches, found))

    dropped = [each for each in step.entries if each.action == "drop"]
    if ask is not None and dropped:
        chosen = listed(dropped)
        if default is not None and first is None:
            # What passes is looked up once, not in front of the queue and in the map.
            yield listed(step.entries, negated=True).rule(chain, Extension("RETURN"), default)
            if len(dropped) == len(step.entries) and (_asks_ports(what) or not _PORTS & set(step.fields)):
                # What is left is dropped. Else a packet that is too short for ports would be left too.
                chosen = what
        yield from ask(chosen._replace(tail=(*what.tail, SAMPLE)))
    if first is not None:
        yield from first(listed(step.entries))
    target = Extension(VERDICTS, (of, Option("--map", words(step.entries, step.fields, family))))
    yield what.rule(chain, target, comment)


def passing_first(table: TableRules) -> TableRules:
    """The same rules, with those that begin a chain for what has no entry (`mapped`) in front of the jump to it.

    What passes them then takes neither the jump nor the rule for the agent's own traffic, whose user is read under a lock; what
    the agent sends passes as well, and is counted there.
    """
    chains = dict(table.chains)
    jumps: list[Rule] = []
    for jump in table.jumps:
        inside = chains.get(jump.target.name, ())
        begin = 1 if inside and inside[0].tag.endswith(f":{OWN_TRAFFIC}") else 0
        passing = list(itertools.takewhile(_is_passing, inside[begin:]))
        if passing:
            chains[jump.target.name] = (*inside[:begin], *inside[begin + len(passing) :])
        jumps += [*(replace(rule, chain=jump.chain) for rule in passing), jump]
    return TableRules(chains, tuple(jumps))


def _is_passing(rule: Rule) -> bool:
    """Whether it is one of those that `mapped` yields first."""
    asked = [option for match in rule.matches if match.name in (PORT, RANGE, ENTRIES) for option in match.options]
    return rule.target.name == "RETURN" and any(option.negated for option in asked)


def _narrow(step: PolicyMap, family: Family, on_ports: bool) -> Extension | None:
    """The match on what no entry can meet, by one field: it takes a tenth of a look-up. None where that is not most.

    on_ports: whether the ports are asked for before. Most packets then have those that entries name.
    """
    found: list[tuple[float, int, int, str]] = []
    for place, field in enumerate(step.fields):
        if field in _OPTIONS and not (on_ports and field in _PORTS):
            first = min(each.spans[place][0] for each in step.entries)
            last = max(each.spans[place][1] for each in step.entries)
            bits = 16 if field in _PORTS else 32 if family == "inet" else 128
            found.append(((last - first) / 2**bits, first, last, field))
    share, first, last, field = min(found, default=(1.0, 0, 0, ""))
    if share > _NARROW:
        return None
    if field in _PORTS:
        return Extension(PORT, (Option(_OPTIONS[field], f"{first}:{last}" if first < last else f"{first}", negated=True),))
    made = IPv4Address if family == "inet" else IPv6Address
    return Extension(RANGE, (Option(_OPTIONS[field], f"{made(first)}-{made(last)}", negated=True),))


def _asks_ports(what: Selected) -> bool:
    return any(match.name in ("multiport", PORT) and not match.options[0].negated for match in what.matches)
