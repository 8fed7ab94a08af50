"""The policies among the elements of a configuration, and what they do with packets that no rule matches."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from nfq_agent.config.capture import InlineConfig
from nfq_agent.config.models import Config, ElementSpec, QueueConfig

if TYPE_CHECKING:
    from nfq_agent.policy_options import PolicyOptions, RuleOptions

# The actions that let nothing pass.
CLOSED: Final = ("drop", "reject")


def policy_of(spec: ElementSpec) -> PolicyOptions | None:
    """The options of a policy; None of another element. Where no policy is configured, no start waits for its models."""
    models = sys.modules.get("nfq_agent.policy_options")
    return spec.options if models is not None and isinstance(spec.options, models.PolicyOptions) else None


def rule_that(spec: ElementSpec, asks: Callable[[RuleOptions], bool]) -> tuple[int, ...]:
    """The place of the first rule of a policy that asks for something, from 0 on; empty where no rule is known to."""
    policy = policy_of(spec)
    return () if policy is None else next(((number - 1,) for number, rule in policy.numbered if asks(rule)), ())


def drops_by_default(config: Config, queue: QueueConfig | InlineConfig) -> str:
    """The setting that drops packets of a queue or an inline link that no rule matches; empty if there is none."""
    if queue.mode == "monitor":
        return ""
    for spec in config.packet_elements(queue):
        default = getattr(spec.options, "default", None)
        if default in CLOSED:
            return f'default = "{default}" of [element.{spec.name}]'
        if default is not None:
            return ""
    return 'default = "drop" of its queue' if queue.default == "drop" else ""
