"""Which settings of a queue or an inline link drop packets without a line in the log."""

from __future__ import annotations

from nfq_agent.config.capture import InlineConfig
from nfq_agent.config.models import Config, QueueConfig


def unlogged_cause(config: Config, taker: QueueConfig | InlineConfig) -> str:
    """For people; empty where each drop is logged or recorded, or nothing is dropped (monitor mode)."""
    if taker.mode == "monitor":
        return ""
    specs = config.packet_elements(taker)
    logged = {spec.name: spec.cls.logs_drops_of(spec.options) for spec in specs}
    if "all" in logged.values():
        return ""
    silent = [name for name, which in logged.items() if which == "none"]
    causes = [f"element{'s' * (len(silent) > 1)} {', '.join(silent)}"] if silent else []
    if taker.default == "drop":
        causes.append('default = "drop"')
    return " or ".join(causes)
