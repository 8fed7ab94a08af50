"""The rules that a configuration asks for on this host: they have to suit its ipsets, and its kernel."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from nfq_agent.config.models import Config, QueueConfig
from nfq_agent.rules.groups import needs_tree
from nfq_agent.rules.model import FAMILIES, Family, Ruleset
from nfq_agent.rules.plan import plan

if TYPE_CHECKING:
    from nfq_agent.host.xtables.backend import RuleHost


def planned(config: Config, uid: int | str, host: RuleHost) -> Ruleset:
    """uid: as in rules.plan. Raises RuleError for an ipset that a rule names and that does not exist or does not fit."""
    from nfq_agent.host import ipsets

    return ipsets.fitted(for_kernel(config, uid, host.lists, host.families))


def for_kernel(config: Config, uid: int | str, lists: bool, families: Collection[Family] = FAMILIES) -> Ruleset:
    """What rules.plan gives, as far as this kernel can ask for what the rules of a policy need."""
    ruleset = plan(config, uid, lists, families)
    if needs_tree(ruleset):
        # Only where a rule needs it: the question takes longer than all the rest of a plan.
        from nfq_agent.host.nftables.support import groups_problem

        if groups_problem() is not None:
            return plan(config, uid, lists, families, groups=False)
    return ruleset


def not_compiled(config: Config, queue: QueueConfig, backend: str) -> str:
    """Why the kernel applies no rule of this queue's policy by owner, though it was asked to (`compile`); empty where it does.

    backend: of the rules, as configured or in use.
    """
    if backend != "owned" or queue.compile_mode == "off":
        return ""
    from nfq_agent.host import cgroups
    from nfq_agent.host.nftables.support import groups_problem
    from nfq_agent.rules.owner_steps import owner_policy

    policy = owner_policy(config, queue)
    if policy is None or not any(step.owner for step in policy.steps):
        return ""
    if cgroups.mounted() is None:
        return "no control groups of version 2 are mounted: no rule by unit, container or cgroup matches"
    problem = groups_problem()
    return "" if problem is None else f"the rules by owner stay in the queue: {problem}"
