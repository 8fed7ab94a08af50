"""Decides from how long each worker has made no progress: feed the service manager's watchdog or not, and whom to kill.

Pure: seconds come in, a decision goes out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

K = TypeVar("K")
# Without a watchdog of the service manager, a worker that makes no progress for this many seconds is killed and replaced.
STUCK: Final = 3.0


@dataclass(frozen=True, slots=True)
class Decision(Generic[K]):
    """feed: tell the service manager that the agent is alive. kill: workers to kill, with the seconds that they are stuck."""

    feed: bool
    kill: Mapping[K, float]


def decide(stuck: Mapping[K, float], period: float | None) -> Decision[K]:
    """stuck: seconds without progress for each worker, proxies included. period: of the service manager's watchdog, if set."""
    if period is not None:
        return Decision(all(seconds < period / 2 for seconds in stuck.values()), {})
    return Decision(False, {worker: seconds for worker, seconds in stuck.items() if seconds > STUCK})
