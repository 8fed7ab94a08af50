"""A configuration with faults added to one of its queues, for a time (`nfq-agent chaos`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from nfq_agent.config.lookups import HostLookups
from nfq_agent.config.models import Config, ConfigError
from nfq_agent.config.source import Source, key_text

# The name of the element; no table of a configuration has it.
ELEMENT: Final = "chaos drill"


def with_chaos(config: Config, queue: str, odds: Mapping[str, Any]) -> Config:
    """The same with an element `chaos` at the end of a queue's chain. odds: its keys. Raises ConfigError."""
    if queue not in config.queue:
        known = ", ".join(config.queue) or "none is configured"
        raise ConfigError([f"no queue {queue!r}; allowed: {known}"])
    if not odds:
        raise ConfigError(["no fault is named; allowed: drop=0.1, delay=0.5, corrupt=0.01 or duplicate=0.1, one or more"])
    from nfq_agent.config.element_faults import element_faults
    from nfq_agent.config.problems import cross_faults

    asked = config.queue[queue]
    if asked.mode == "monitor" and odds.get("drop"):
        raise ConfigError([f"drop: queue {queue} is in monitor mode and drops nothing; allowed: delay, corrupt and duplicate"])
    changed = config.model_copy(
        {
            "queue": {**config.queue, queue: asked.model_copy({"elements": (*asked.elements, ELEMENT)})},
            "element": {**config.element, ELEMENT: {"type": "chaos", **odds}},
        }
    )
    source = Source(Path("chaos"))
    drill = {"element": changed.element, "queue": {queue: {"elements": [ELEMENT]}}}
    found = (*element_faults(drill, source, HostLookups()), *cross_faults(changed, source))
    faults = [fault.removeprefix(f"chaos: {key_text(('element', ELEMENT))}.") for fault in found]
    if faults:
        raise ConfigError(faults)
    return changed
