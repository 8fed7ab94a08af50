"""Which marks must be routed to this host, so that TPROXY rules can deliver; host/routes.py writes it."""

from __future__ import annotations

from nfq_agent.config.models import Config
from nfq_agent.mark import Mark
from nfq_agent.rules.model import Family


def wanted(*configs: Config) -> dict[Family, set[Mark]]:
    """The marks whose packets are routed to this host, by family; empty where no rule uses TPROXY."""
    marks: dict[Family, set[Mark]] = {}
    for config in configs:
        for rule in config.rules.values():
            proxy = config.proxy[rule.proxy] if rule.proxy is not None else None
            if proxy is not None and proxy.capture == "tproxy":
                for family in rule.families:
                    marks.setdefault(family, set()).add(proxy.tproxy_mark)
    return marks
