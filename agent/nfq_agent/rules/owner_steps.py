"""Which rules of a policy by owner the kernel can decide for the first packet of a flow. No I/O.

A policy that names a unit, a container or a control group judges flows, by their first packet. The kernel decides such a packet
where the control group of its socket is known; everything else goes to the queue. It keeps no flow: what it drops begins again
with the next packet, and what it accepts needs the mark of `offload`, so that the rest of the flow passes by it too.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from nfq_agent.config.models import Config, ElementSpec, QueueConfig
from nfq_agent.config.policies import policy_of
from nfq_agent.element import PacketElement
from nfq_agent.elements import packet_element
from nfq_agent.mark import Kept
from nfq_agent.match import PLACES
from nfq_agent.policy_rule import DEFAULT, rule_label
from nfq_agent.rules.group_tree import condition

if TYPE_CHECKING:
    from nfq_agent.policy_options import PolicyOptions, RuleOptions

# What of an owner follows from the control group alone.
_BY_GROUP: Final = ("unit", "container", "cgroup")
# Rules at most that are asked at each level of the groups.
MOST: Final = 32


class OwnerStep(NamedTuple):
    """A rule of a policy, or its default. number: in its policy, from 1; 0 for the default.

    action: "accept" and "drop" are the kernel's; "ask" sends to the queue what the rule may match. owner: what it asks of the
    control group, as `rules.group_tree.condition` writes it; empty for nothing.
    """

    number: int
    label: str
    action: str
    owner: str
    conditions: RuleOptions | None


class OwnerPolicy(NamedTuple):
    """element: its name. kept: the marks of the flows that are accepted; None where none is kept."""

    element: str
    kept: Kept | None
    steps: tuple[OwnerStep, ...]

    @property
    def decided(self) -> tuple[OwnerStep, ...]:
        """The rules that the kernel decides by."""
        return tuple(each for each in self.steps if each.action != "ask")


class HeadPolicy:
    """The options of a policy and whether drops are applied, compared by identity: a policy may have thousands of rules, and a
    plan asks for them again and again."""

    __slots__ = ("drops", "options")

    def __init__(self, options: PolicyOptions, drops: bool) -> None:
        self.options = options
        self.drops = drops

    def __hash__(self) -> int:
        return hash((id(self.options), self.drops))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HeadPolicy) and other.options is self.options and other.drops == self.drops


def policy_at_head(config: Config, queue: QueueConfig) -> tuple[str, HeadPolicy, Sequence[ElementSpec]] | None:
    """The policy that is a queue's first element: its name, its options, and the other elements. None where there is none, or
    where the kernel is to apply none."""
    if queue.compile_mode == "off":
        return None
    specs = config.packet_elements(queue)
    if not specs:
        return None
    first, *others = specs
    options = policy_of(first)
    if options is None or first.cls is not packet_element("policy") or options.explain:
        return None
    # In monitor mode, what would be dropped is counted, and passes.
    return first.name, HeadPolicy(options, queue.mode == "enforce"), others


def overrides(spec: ElementSpec, method: str) -> bool:
    """Whether an element has a method of its own."""
    return getattr(spec.cls, method) is not getattr(PacketElement, method)


def owner_policy(config: Config, queue: QueueConfig) -> OwnerPolicy | None:
    """The policy by owner at the head of a queue, as far as the kernel can apply it; None where it cannot."""
    head = policy_at_head(config, queue)
    if head is None:
        return None
    name, asked, others = head
    options = asked.options
    # A fact needs packets that come later.
    if not any(rule.owned_by for rule in options.rules) or any(rule.wanted for rule in options.rules):
        return None
    missed = () if queue.compile_mode == "first" else ("judged", "follow")
    if any(overrides(spec, method) for spec in others for method in missed):
        return None
    if any(overrides(spec, "amend") and spec.cls is not packet_element("offload") for spec in others):
        return None
    if options.default is None and (queue.default == "drop" or any(overrides(spec, "decide") for spec in others)):
        # What no rule matches may be denied, and is not asked again.
        return None
    kept = config.kept(queue)
    steps = _steps(asked, kept is not None)
    return OwnerPolicy(name, kept, steps) if steps else None


def by_headers(rule: RuleOptions) -> bool:
    """Whether the kernel sees all that a rule asks of the headers, and sees it as the worker does."""
    if any(getattr(rule, key) is not None for key in PLACES):
        return False
    return all("*" not in name[:-1] and not set("?[]") & set(name) for name in rule.interface or ())


@functools.lru_cache(maxsize=16)
def _steps(asked: HeadPolicy, keeps: bool) -> tuple[OwnerStep, ...]:
    """keeps: whether the kernel keeps what it accepts. Nothing behind the last that decides."""
    options = asked.options
    kernel = {name for name, applied in (("drop", asked.drops), ("accept", keeps)) if applied}
    found: list[OwnerStep] = []
    for number, rule in options.numbered:
        if not by_headers(rule):
            break
        owned = dict(rule.owned_by)
        # The program of a socket is the worker's to find.
        decides = rule.action in kernel and owned.keys() <= set(_BY_GROUP)
        groups = [(key, globs) for key, globs in owned.items() if key in _BY_GROUP]
        owner = condition(groups) if owned else ""
        found.append(OwnerStep(number, rule_label(number, rule.name), rule.action if decides else "ask", owner, rule))
    else:
        if options.default in kernel:
            found.append(OwnerStep(0, DEFAULT, options.default, "", None))
    while found and found[-1].action == "ask":
        found.pop()
    return tuple(found)
