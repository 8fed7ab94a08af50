"""The log lines of a proxy about single connections: rate-limited, so that a flood of connections is not a flood of lines."""

from __future__ import annotations

from typing import Any, Final

from nfq_agent.element import Emit
from nfq_agent.rate import Bucket, Suppressed
from nfq_agent.stream import Connection, Failed
from nfq_agent.values import Endpoint

# Lines a second.
RATE: Final = 20.0
# Seconds between two lines that say that the proxy is full.
FULL_EVERY: Final = 10.0


class Lines:
    """The warnings of one process of a proxy. Those beyond the rate are counted, and the count is logged."""

    def __init__(self, name: str, emit: Emit) -> None:
        self.name = name
        self._emit = emit
        self._bucket = Bucket(RATE, RATE, 0.0)
        self._suppressed = Suppressed()
        self._full = Bucket(1 / FULL_EVERY, 1.0, 0.0)

    def few_descriptors(self, descriptors: int, possible: int, wanted: int) -> None:
        """The process may open fewer descriptors than its connections need: two each."""
        self._emit(
            f"proxy {self.name}: {descriptors} descriptors are enough for {possible} connections, not for {wanted}; "
            "raise LimitNOFILE= or lower max_connections",
            level="warning",
        )

    def refused(self, identity: str, client: tuple[str, int], why: str, now: float) -> None:
        """A connection was refused before it was carried anywhere."""
        src, sport = client
        what = f"proxy {self.name}: connection {identity}: refused, from {Endpoint(src, sport)}: {why}"
        self.warn(what, now, connection=identity, proto="tcp", src=src, sport=sport)

    def unreachable(self, connection: Connection, reason: str, now: float) -> None:
        """No address of a connection's destination could be reached."""
        self.warn(
            f"proxy {self.name}: connection {connection.id}: cannot connect {Endpoint(*connection.client)} to "
            f"{Endpoint(*connection.upstream)}: {reason}",
            now,
            **connection.fields,
        )

    def element_failed(self, connection: Connection, failed: Failed, on_error: str, now: float) -> None:
        """An element raised."""
        self.warn(
            f"connection {connection.id}: element {failed.element} raised {type(failed.error).__name__}: {failed.error}; "
            f"on_error = {on_error}",
            now, level="error", element=failed.element, **connection.fields,
        )  # fmt: skip

    def timed_out(self, connection: Connection, reason: str, now: float) -> None:
        """A connection was ended because it was silent for too long."""
        self.warn(
            f"proxy {self.name}: connection {connection.id}: {Endpoint(*connection.client)} -> {Endpoint(*connection.upstream)} "
            f"is reset: {reason}",
            now, level="info", event="timed_out", reason=reason, **connection.fields,
        )  # fmt: skip

    def full(self, active: int, waiting: int, now: float) -> None:
        """No further connection can be accepted."""
        if self._full.take(now):
            self._emit(
                f"proxy {self.name}: full: {active} connections run, {waiting} wait to be accepted; "
                "raise max_connections, or lower the timeouts",
                level="warning", event="full", active=active, waiting=waiting,
            )  # fmt: skip

    def warn(self, message: str, now: float, level: str = "warning", **fields: Any) -> None:
        """Log one line, unless there were too many."""
        if not self._bucket.take(now):
            self._suppressed.add(now)
        else:
            self._emit(message, level=level, **fields)
        if count := self._suppressed.due(now):
            self._emit(f"proxy {self.name}: {count} more warnings were suppressed", level="warning", suppressed=count)
