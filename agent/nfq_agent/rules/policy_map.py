"""Many leading rules of a policy as one map of the kernel, which is looked up once where each rule would be asked. No I/O."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from nfq_agent.rules.entries import MapEntry, apart, entries_of, in_order, shape, words
from nfq_agent.rules.model import ENTRIES, VERDICTS, Extension, Family, Option, Rule, comment_match
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


class Leading(NamedTuple):
    """A rule of a policy, or its default, that the kernel applies. number: in its policy, from 1; 0 for the default."""

    number: int
    label: str
    action: str
    conditions: RuleOptions | None


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
    step: PolicyMap, name: str, instance: str, chain: str, family: Family, what: Selected, ask: Ask | None, first: Ask | None
) -> Iterator[Rule]:
    """The rule that looks up a map. ask: where some of what is dropped goes to the queue. first: where first packets do."""
    if not step.entries:
        # They name only networks of the other family.
        return
    of = Option("--of", ",".join(step.fields))

    def listed(entries: Iterable[MapEntry]) -> Selected:
        bare = [each._replace(action="", number=0) for each in entries]
        found = Extension(ENTRIES, (of, Option("--list", words(in_order(bare), step.fields, family))))
        return what._replace(matches=(*what.matches, found))

    dropped = [each for each in step.entries if each.action == "drop"]
    if ask is not None and dropped:
        yield from ask(listed(dropped)._replace(tail=(*what.tail, SAMPLE)))
    if first is not None:
        yield from first(listed(step.entries))
    target = Extension(VERDICTS, (of, Option("--map", words(step.entries, step.fields, family))))
    matches = (*what.matches, *what.tail, comment_match(instance, f"{name}.{step.first}-{step.last}"))
    yield Rule(chain, target, matches, what.protocol, what.in_interface, what.out_interface)
