"""The rules that a configuration asks for on this host, whose ipsets they have to suit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nfq_agent.config.models import Config
from nfq_agent.rules.model import Ruleset
from nfq_agent.rules.plan import plan

if TYPE_CHECKING:
    from nfq_agent.host.xtables.backend import RuleHost


def planned(config: Config, uid: int | str, host: RuleHost) -> Ruleset:
    """uid: as in rules.plan. Raises RuleError for an ipset that a rule names and that does not exist or does not fit."""
    from nfq_agent.host import ipsets

    return ipsets.fitted(plan(config, uid, host.lists, host.families))
