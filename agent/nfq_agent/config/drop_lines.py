"""Which drops of a queue, a tap or an inline link the worker logs by itself, because no element does."""

from __future__ import annotations

from nfq_agent.config.capture import CaptureConfig
from nfq_agent.config.models import Config, QueueConfig


def drop_lines(config: Config, taker: QueueConfig | CaptureConfig) -> frozenset[str] | None:
    """The elements that log their own drops, and need no line of the worker's; None where it writes none.

    It writes none with `log_drops = false`, and where an element logs or records every drop. Raises ElementError.
    """
    logged = {spec.name: spec.cls.logs_drops_of(spec.options) for spec in config.packet_elements(taker)}
    if not taker.log_drops or "all" in logged.values():
        return None
    return frozenset(name for name, which in logged.items() if which == "own")
