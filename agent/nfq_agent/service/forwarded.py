"""Whether rules lead traffic that the host forwards to a queue. What follows interfaces for it is loaded only then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from nfq_agent.config.models import Config
from nfq_agent.owner import Owners

_HOOKS: Final = frozenset(("prerouting", "forward", "postrouting"))


class Forwarded:
    """The supervisor's side of a queue: here, of one to which no rule leads forwarded traffic."""

    def __init__(self, config: Config) -> None:
        self.sockets = config.agent.container_sockets

    def open(self) -> None:
        """Begin to follow interfaces. Raises OSError."""

    def close(self) -> None:
        """Stop."""

    @property
    def follows(self) -> dict[int, Callable[[], None]]:
        """The socket that reports interfaces, and the function that reads it."""
        return {}

    def look(self) -> None:
        """Called once a second."""

    def owners(self, host: Owners) -> Owners:
        """In the worker's process: who a flow belongs to. host: for flows of the host's own sockets."""
        return host

    def differs(self, other: Forwarded) -> bool:
        """Whether another process is needed for it."""
        return (type(self), self.sockets) != (type(other), other.sockets)


def leads_forwarded(config: Config, queue: str) -> bool:
    """Whether rules lead traffic to the queue that the host forwards. queue: its name in the configuration."""
    return any(rule.queue == queue and _HOOKS & set(rule.hooks) for rule in config.rules.values())
