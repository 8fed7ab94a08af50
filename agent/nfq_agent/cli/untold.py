"""Which conditions of policies a capture does not tell about: who has a socket. In a replay they never hold."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Final

from nfq_agent.config.models import Config
from nfq_agent.config.policies import policy_of
from nfq_agent.policy_options import OWNED_BY
from nfq_agent.policy_rule import rule_label

_KEYS: Final = (*OWNED_BY, "uid", "gid")


def untold(config: Config, told: Container[str] = ()) -> Iterator[str]:
    """Each such key and where it is: `unit of allow (rule 1)`, `unit of allow (12 rules)`. told: keys that it tells."""
    # A policy may be an element of several queues.
    specs = {spec.name: spec for queue in config.queue.values() for spec in config.packet_elements(queue)}
    for name, spec in specs.items():
        if (policy := policy_of(spec)) is None:
            continue
        for key in (key for key in _KEYS if key not in told):
            places = [rule_label(number, rule.name) for number, rule in policy.numbered if getattr(rule, key) is not None]
            if places:
                yield f"{key} of {name} ({places[0] if len(places) == 1 else f'{len(places)} rules'})"
