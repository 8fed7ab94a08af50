"""Which rules of a policy by owner the kernel can decide for the first packet of a flow. No I/O.

A policy that names a unit, a container or a control group judges flows, by their first packet. The kernel decides such a packet
where the control group of its socket is known; everything else goes to the queue. It keeps no flow: what it drops begins again
with the next packet, and what it accepts needs the mark of `offload`, so that the rest of the flow passes by it too.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final, NamedTuple

from nfq_agent.config.models import Config, QueueConfig
from nfq_agent.config.policy_summary import policy_of
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


def owner_policy(config: Config, queue: QueueConfig) -> OwnerPolicy | None:
    """The policy by owner at the head of a queue, as far as the kernel can apply it; None where it cannot."""
    if queue.compile_mode == "off":
        return None
    specs = config.packet_elements(queue)
    if not specs:
        return None
    first, *others = specs
    options = policy_of(first)
    if options is None or first.cls is not packet_element("policy") or options.explain:
        return None
    # A fact needs packets that come later.
    if not any(rule.owned_by for rule in options.rules) or any(rule.wanted for rule in options.rules):
        return None
    missed = () if queue.compile_mode == "first" else ("judged", "follow")
    if any(_overrides(spec.cls, method) for spec in others for method in missed):
        return None
    if any(_overrides(spec.cls, "amend") and spec.cls is not packet_element("offload") for spec in others):
        return None
    if options.default is None and (queue.default == "drop" or any(_overrides(spec.cls, "decide") for spec in others)):
        # What no rule matches may be denied, and is not asked again.
        return None
    kept = config.kept(queue)
    steps = _steps(_Asked(options), queue.mode == "enforce", kept is not None)
    return OwnerPolicy(first.name, kept, steps) if steps else None


def by_headers(rule: RuleOptions) -> bool:
    """Whether the kernel sees all that a rule asks of the headers, and sees it as the worker does."""
    if any(getattr(rule, key) is not None for key in PLACES):
        return False
    return all("*" not in name[:-1] and not set("?[]") & set(name) for name in rule.interface or ())


def _overrides(cls: type[PacketElement], method: str) -> bool:
    return getattr(cls, method) is not getattr(PacketElement, method)


class _Asked:
    """The options of a policy, compared by identity: a plan asks for them again and again."""

    __slots__ = ("options",)

    def __init__(self, options: PolicyOptions) -> None:
        self.options = options

    def __hash__(self) -> int:
        return id(self.options)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Asked) and other.options is self.options


@functools.lru_cache(maxsize=16)
def _steps(asked: _Asked, drops: bool, keeps: bool) -> tuple[OwnerStep, ...]:
    """drops: whether drops are applied. keeps: whether the kernel keeps what it accepts. Nothing behind the last that decides."""
    options = asked.options
    kernel = {name for name, applied in (("drop", drops), ("accept", keeps)) if applied}
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
