"""Decides which workers to kill, and whether the agent as a whole is alive, from the time each worker has made no progress.

Pure: seconds come in, a decision goes out. The service manager notices a supervisor that hangs, since it is not fed then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

K = TypeVar("K")
# A worker that makes no progress for this many seconds, without the time that it waited for a CPU, is killed and replaced.
STUCK: Final = 3.0
# A worker that cannot be killed (it waits in the kernel) for this many seconds needs a new agent, or a new boot.
HOPELESS: Final = 30.0


@dataclass(frozen=True, slots=True)
class Decision(Generic[K]):
    """feed: tell the service manager that the agent is alive. kill: workers to kill, with the seconds that they are stuck."""

    feed: bool
    kill: Mapping[K, float]


def decide(stuck: Mapping[K, float]) -> Decision[K]:
    """stuck: seconds without progress for each worker: of queues, proxies and taps."""
    return Decision(
        feed=all(seconds < HOPELESS for seconds in stuck.values()),
        kill={worker: seconds for worker, seconds in stuck.items() if seconds > STUCK},
    )
