"""The leading rules of a policy that headers alone decide, as rules of the kernel in front of the queue (`compile`). No I/O.

Only for the backend `owned`, which takes lists of any length, and only where no element would miss a packet: the policy is the
first element, and no other one listens to packets, changes verdicts or follows flows. With `compile = "first"` others may listen
and follow: the first packets of flows go to the queue, at a rate, and those beyond it are counted.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from nfq_agent.config.drop_lines import drop_lines
from nfq_agent.config.models import Config, QueueConfig
from nfq_agent.config.rule import INWARD, RuleConfig
from nfq_agent.element import Needs
from nfq_agent.elements import packet_element
from nfq_agent.match import Conditions
from nfq_agent.packet import TCP, UDP
from nfq_agent.policy_rule import DEFAULT, rule_label
from nfq_agent.rules.entries import parsed, protocols_of
from nfq_agent.rules.model import VERDICTS, Extension, Family, Option, Rule, comment_match
from nfq_agent.rules.owner_steps import HeadPolicy, OwnerStep, by_headers, overrides, owner_policy, policy_at_head
from nfq_agent.rules.policy_map import SAMPLE, Ask, Leading, PolicyMap, all_passes, compared, mapped, with_maps
from nfq_agent.rules.selection import SYN_ACK, Selected, port_lists, range_lists

if TYPE_CHECKING:
    from nfq_agent.policy_options import RuleOptions

# The first packet of a flow, as connection tracking sees it: each packet of one that is not answered.
_NEW: Final = Extension("conntrack", (Option("--ctstate", "NEW"),))
# The name of the rules that count those that are not sent to the queue, and how they are told of.
UNRECORDED: Final = "unrecorded"
NOT_RECORDED: Final = "first packets not recorded"
# Rules of a policy that the kernel applies, at most, and how many of them, or maps of them, it asks one after the other.
MOST: Final = 4096
MOST_STEPS: Final = 256
TARGETS: Final = {"accept": "RETURN", "drop": "DROP"}
_NAMES: Final = {TCP: "tcp", UDP: "udp"}
_NUMBERS: Final = {name: number for number, name in _NAMES.items()}
_OUT: Final = frozenset(("output", "postrouting"))
_DIRECTIONS: Final = {"in": INWARD, "out": _OUT}


def kernel_rules(config: Config, queue: QueueConfig) -> tuple[str, Sequence[Leading]]:
    """The name of the queue's first element, and what of it the kernel can decide; empty where that is nothing.

    The search ends at the first rule that needs more than headers, and in monitor mode at the first that drops.
    """
    name, asked = _asked(config, queue)
    return name, () if asked is None else _leading(asked)


def _asked(config: Config, queue: QueueConfig) -> tuple[str, HeadPolicy | None]:
    """The name of the queue's first element, and the options of the policy on headers that it is."""
    head = policy_at_head(config, queue)
    if head is None:
        return "", None
    name, asked, others = head
    # The methods by which another element would have to know of what the kernel decides.
    missed = ("amend",) if queue.compile_mode == "first" else ("judged", "amend", "follow")
    if any(overrides(spec, method) for spec in others for method in missed):
        return "", None
    # A flow is judged by its first packet, and packets of both directions then get its verdict.
    return ("", None) if _judges_flows(asked) else (name, asked)


@functools.lru_cache(maxsize=16)
def _judges_flows(asked: HeadPolicy) -> bool:
    return packet_element("policy").needs_of(asked.options) is Needs.FLOW


@functools.lru_cache(maxsize=16)
def _leading(asked: HeadPolicy) -> tuple[Leading, ...]:
    options, drops = asked.options, asked.drops
    found: list[Leading] = []
    for number, rule in options.numbered[:MOST]:
        if (rule.action != "accept" and not (drops and rule.action == "drop")) or not by_headers(rule):
            return tuple(found)
        found.append(Leading(number, rule_label(number, rule.name), rule.action, rule))
    if len(options.numbered) <= MOST and (options.default == "accept" or (drops and options.default == "drop")):
        found.append(Leading(0, DEFAULT, options.default, None))
    return tuple(found)


def before_queue(
    config: Config, name: str, rule: RuleConfig, chain: str, hook: str, family: Family, what: Selected, ask: Ask
) -> Iterator[Rule]:
    """The rules in front of the one that sends these packets to the queue. name: of the rule in the configuration.

    ask: the rules that send packets to the queue.
    """
    queue = config.queue[rule.queue or ""]
    element, asked = _asked(config, queue)
    if rule.bridge or asked is None:
        return
    what = what._replace(matches=compared(what.matches))
    # The worker logs drops: it gets some of the packets.
    sampled = drop_lines(config, queue) is not None
    unrecorded = comment_match(config.agent.instance, policy_tag(name, element, UNRECORDED))

    def first_packets(chosen: Selected) -> Iterator[Rule]:
        new = chosen._replace(matches=(_NEW, *chosen.matches))
        yield from ask(new._replace(tail=(*new.tail, SAMPLE)))
        yield new.rule(chain, Extension(""), unrecorded)

    first = first_packets if queue.compile_mode == "first" else None
    users = False
    default = comment_match(config.agent.instance, policy_tag(name, element, DEFAULT))
    steps = _steps(asked, family)[:MOST_STEPS]
    for place, each in enumerate(steps, 1):
        if isinstance(each, PolicyMap):
            # Without entries, they name only networks of the other family.
            if each.entries:
                comment = comment_match(config.agent.instance, f"{name}.{element}.{each.first}-{each.last}")
                passing = default if all_passes(steps[place:]) else None
                yield from mapped(each, comment, passing, chain, family, what, ask if sampled else None, first)
            continue
        made = written(each, hook, family, what)
        if made is None:
            return
        if made and _asks_user(each.conditions) and not users:
            users = True
            yield from _half_open(what, ask)
        comment = comment_match(config.agent.instance, policy_tag(name, element, each.number))
        for choice in made:
            matches = (*what.matches, *compared(choice.matches, family == "inet"))
            chosen = Selected(choice.protocol, matches, choice.inward, choice.outward, what.tail)
            if sampled and each.action == "drop":
                yield from ask(chosen._replace(tail=(*what.tail, SAMPLE)))
            if first is not None:
                yield from first(chosen)
            yield chosen.rule(chain, Extension(TARGETS[each.action]), comment)


@functools.lru_cache(maxsize=32)
def _steps(asked: HeadPolicy, family: Family) -> tuple[Leading | PolicyMap, ...]:
    return tuple(with_maps(_leading(asked), family))


def _asks_user(conditions: RuleOptions | None) -> bool:
    return conditions is not None and (conditions.uid is not None or conditions.gid is not None)


def _half_open(what: Selected, ask: Ask) -> Iterator[Rule]:
    """Send the answers to new connections to the queue: nf_tables takes the user of the listener for theirs, and the worker
    learns of none (nft_meta_get_eval_skugid, nfqnl_put_sk_uidgid).
    """
    if "tcp" in protocols_among(what.protocol, {TCP}):
        yield from ask(what._replace(protocol="tcp", matches=(SYN_ACK, *what.matches)))


def reasons(config: Config) -> dict[str, tuple[str, str, str]]:
    """Queue, element and label by the name that a rule's tag has behind that of its instance."""
    found: dict[str, tuple[str, str, str]] = {}
    for name, rule in config.rules.items():
        if rule.queue is not None:
            queue = config.queue[rule.queue]
            element, rules = _applied(config, queue)
            found |= {policy_tag(name, element, each.number): (rule.queue, element, each.label) for each in rules}
            if rules and queue.compile_mode == "first":
                found[policy_tag(name, element, UNRECORDED)] = rule.queue, element, NOT_RECORDED
    return found


def _applied(config: Config, queue: QueueConfig) -> tuple[str, Sequence[Leading | OwnerStep]]:
    """What of a policy the kernel decides by, by headers or by owner."""
    by_owner = owner_policy(config, queue)
    return kernel_rules(config, queue) if by_owner is None else (by_owner.element, by_owner.decided)


def names_of(tag: str, numbers: Iterable[int]) -> list[str]:
    """What `reasons` calls a rule: its name by its tag, or those of the rules in its map. numbers: of these rules."""
    return [f"{tag.rpartition('.')[0]}.{number}" for number in numbers] or [tag]


def numbers_of(rule: Rule) -> list[int]:
    """The numbers of the policy's rules in the map of a rule; none where it has no map."""
    if rule.target.name != VERDICTS:
        return []
    return sorted({each.number for each in parsed(rule.target.options[1].value)})


def policy_tag(name: str, element: str, number: int | str) -> str:
    """The name of a rule of a policy, or of what else stands in its place. name: of the rule that leads to the queue."""
    return f"{name}.{element}.{number or DEFAULT}"


class Choice(NamedTuple):
    """Conditions that hold together. matches: all but those on the protocol and the interfaces."""

    protocol: str
    matches: tuple[Extension, ...]
    inward: str
    outward: str


def written(rule: Leading, hook: str, family: Family, what: Selected) -> list[Choice] | None:
    """Alternatives, of which any one is enough; None if the kernel cannot decide this rule, and so no later one."""
    if rule.conditions is None:
        # What the link needs passes a closed default: ICMPv6.
        if family == "inet6" and rule.action == "drop" and what.protocol not in _NUMBERS:
            return None
        return [Choice(what.protocol, (), what.in_interface, what.out_interface)]
    conditions = rule.conditions
    if hook not in _hooks(conditions, hook):
        return []
    matches: list[Extension] = []
    for key, networks in (("--src-range", conditions.src), ("--dst-range", conditions.dst)):
        if networks is not None:
            ranges = list(range_lists(networks, family, lists=True))
            if not ranges:
                return []
            matches.append(Extension("iprange", (Option(key, ranges[0]),)))
    for key, ports in (("--sports", conditions.sport), ("--dports", conditions.dport)):
        matches += [Extension("multiport", (Option(key, each),)) for each in port_lists(ports or (), lists=True)]
    interfaces = _interfaces(conditions, hook, what)
    if interfaces is None:
        return None
    if _asks_user(conditions) and hook not in _OUT:
        # The kernel finds the socket of some packets that come in, and does not tell the worker of each.
        return None
    users = [_user("--uid-owner", each) for each in conditions.uid or ()] or [()]
    groups = [_user("--gid-owner", each) for each in conditions.gid or ()] or [()]
    protocols = _protocols(conditions, what.protocol)
    return [
        Choice(protocol, (*matches, *user, *group), *pair)
        for protocol in protocols
        for pair in interfaces
        for user in users
        for group in groups
    ]


def _user(option: str, number: int) -> tuple[Extension, ...]:
    return (Extension("owner", (Option(option, str(number)),)),)


def _hooks(conditions: Conditions, hook: str) -> frozenset[str]:
    """The hooks in which it may hold, as far as `hook` is concerned."""
    allowed = frozenset(conditions.hook or (hook,))
    return allowed if conditions.direction is None else allowed & _DIRECTIONS[conditions.direction]


def _protocols(conditions: Conditions, selected: str) -> list[str]:
    """The protocols of the packets that are selected and asked for."""
    wanted = protocols_of(conditions)
    return [selected] if wanted is None else protocols_among(selected, wanted)


def protocols_among(selected: str, wanted: set[int]) -> list[str]:
    """Those of the protocols that are selected."""
    if selected.startswith("! "):
        wanted = wanted - {_NUMBERS[name] for name in selected.removeprefix("! ").split(",")}
    elif selected:
        number = _NUMBERS.get(selected)
        wanted = wanted & {int(selected) if number is None else number}
    return [_NAMES.get(number, str(number)) for number in sorted(wanted)]


def _interfaces(conditions: Conditions, hook: str, what: Selected) -> list[tuple[str, str]] | None:
    """Pairs of the interface by which a packet comes in and the one by which it leaves; None where a rule cannot ask for both
    what is selected and what the policy asks for."""
    if conditions.interface is None:
        return [(what.in_interface, what.out_interface)]
    made = []
    for name in sorted(conditions.interface):
        wanted = name.removesuffix("*") + "+" if name.endswith("*") else name
        if hook not in _OUT:
            if what.in_interface not in ("", wanted):
                return None
            made.append((wanted, what.out_interface))
        if hook not in INWARD:
            if what.out_interface not in ("", wanted):
                return None
            made.append((what.in_interface, wanted))
    return made
