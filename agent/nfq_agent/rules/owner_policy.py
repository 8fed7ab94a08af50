"""The rules in front of a queue that decide the first packet of a flow by the control group of its socket. No I/O.

Of packets that leave the host alone, of TCP (a SYN) and UDP, which connection tracking calls new: they have their socket. From
the deepest level of groups up to the root, all rules are asked of the packets whose group is at that level and known; then what
has a group there that is not known goes to the queue, so that no packet is taken for one of the group above its own. rules.groups
fills in the groups that exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from nfq_agent.config.drop_lines import drop_lines
from nfq_agent.config.models import Config
from nfq_agent.config.rule import RuleConfig
from nfq_agent.mark import Kept
from nfq_agent.packet import TCP, UDP
from nfq_agent.rules.group_tree import DEEPEST, condition
from nfq_agent.rules.kernel_policy import TARGETS, UNRECORDED, Choice, policy_tag, protocols_among, written
from nfq_agent.rules.model import AT_LEVEL, OFFLOAD_NEW, Extension, Family, Option, Rule, comment_match
from nfq_agent.rules.owner_steps import MOST, OwnerStep, owner_policy
from nfq_agent.rules.policy_map import SAMPLE, Ask, Leading
from nfq_agent.rules.selection import SYN, Selected

_NOT_NEW: Final = Extension("conntrack", (Option("--ctstate", "NEW", negated=True),))
_NOT_SYN: Final = Extension(SYN.name, tuple(option._replace(negated=True) for option in SYN.options))
_ALL_KNOWN: Final = condition(())


class _Place(NamedTuple):
    """Where the rules of a policy stand. sampled: the worker gets some of what is dropped. first: it gets first packets."""

    chain: str
    what: Selected
    ask: Ask
    tag: Callable[[int | str], Extension]
    kept: Kept | None
    sampled: bool
    first: bool


def before_queue(  # noqa: PLR0913  # as that of rules.kernel_policy, and groups
    config: Config, name: str, rule: RuleConfig, chain: str, hook: str, family: Family, what: Selected, ask: Ask, groups: bool
) -> Iterator[Rule]:
    """The rules in front of the one that sends these packets to the queue, as in rules.kernel_policy.

    groups: whether the kernel can ask for control groups; else the rules from the first that needs one on are left to the queue.
    """
    queue = config.queue[rule.queue or ""]
    protocols = protocols_among(what.protocol, {TCP, UDP})
    if hook != "output" or rule.bridge or rule.table_name == "raw" or rule.by_owner(hook) or not protocols:
        return
    policy = owner_policy(config, queue)
    if policy is None:
        return
    found = _written(policy.steps, hook, family, what)
    begin = next((place for place, (step, _) in enumerate(found) if step.owner), len(found))
    if not groups:
        found = found[:begin]
    if not found:
        return
    instance = config.agent.instance
    sampled = drop_lines(config, queue) is not None

    def tag(number: int | str) -> Extension:
        return comment_match(instance, policy_tag(name, policy.element, number))

    place = _Place(chain, what, ask, tag, policy.kept, sampled, queue.compile_mode == "first")
    yield from ask(what._replace(matches=(_NOT_NEW, *what.matches)))
    if "tcp" in protocols:
        yield from ask(what._replace(protocol="tcp", matches=(_NOT_SYN, *what.matches)))
    if what.protocol not in protocols:
        yield from ask(what._replace(protocol="! tcp,udp"))
    for step, choices in found[:begin]:
        yield from _applied(step, choices, place, None, instance)
    if begin == len(found):
        return
    for level in range(DEEPEST + 1, -1, -1):
        for step, choices in found[begin : begin + MOST] if level <= DEEPEST else ():
            yield from _applied(step, choices, place, _group(level, step.owner or _ALL_KNOWN), instance)
        if level:
            yield from ask(what._replace(matches=(_group(level, ""), *what.matches)))


def _group(level: int, owner: str) -> Extension:
    meant = (Option("--owner", owner),) if owner else ()
    return Extension(AT_LEVEL, (Option("--level", str(level)), *meant))


def _written(steps: tuple[OwnerStep, ...], hook: str, family: Family, what: Selected) -> list[tuple[OwnerStep, list[Choice]]]:
    """The alternatives of each rule that the kernel can ask for; none behind the last that decides."""
    found: list[tuple[OwnerStep, list[Choice]]] = []
    for step in steps:
        if step.conditions is None:
            choices: list[Choice] | None = [Choice(what.protocol, (), what.in_interface, what.out_interface)]
        else:
            choices = written(Leading(step.number, step.label, step.action, step.conditions), hook, family, what)
        if choices is None:
            break
        # Nothing but TCP and UDP comes so far.
        found.append((step, [each for each in choices if each.protocol in ("tcp", "udp", what.protocol)]))
    while found and found[-1][0].action == "ask":
        found.pop()
    return found


def _applied(step: OwnerStep, choices: list[Choice], place: _Place, group: Extension | None, instance: str) -> Iterator[Rule]:
    what = place.what
    groups = () if group is None else (group,)
    for choice in choices:
        matches = (*groups, *what.matches, *choice.matches)
        chosen = Selected(choice.protocol, matches, choice.inward, choice.outward, what.tail)
        if step.action == "ask":
            yield from place.ask(chosen)
            continue
        if place.first or (place.sampled and step.action == "drop"):
            yield from place.ask(chosen._replace(tail=(*what.tail, SAMPLE)))
        if place.first:
            yield chosen.rule(place.chain, Extension(""), place.tag(UNRECORDED))
        if step.action == "accept" and place.kept is not None:
            # As `offload` has it done: the rest of the flow passes by this mark.
            keep = Extension("CONNMARK", (Option("--set-xmark", str(place.kept.accept)),))
            yield chosen.rule(place.chain, keep, comment_match(instance, OFFLOAD_NEW))
        yield chosen.rule(place.chain, Extension(TARGETS[step.action]), place.tag(step.number))
