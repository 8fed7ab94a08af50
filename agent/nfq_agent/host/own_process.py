"""What a worker's loop asks of its own process. The code that forks the worker provides it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nfq_agent.host.jail.calls import ProcessNeeds


def _nothing(_: ProcessNeeds | None = None) -> None:
    pass


@dataclass(frozen=True, slots=True)
class OwnProcess:
    """beat: called at least once a second, as long as the loop makes progress.

    shut: called once before the first packet or connection, when everything that the process needs is open; nothing else can be
    opened after that. Takes what the loop itself needs, None where that is known already.
    """

    beat: Callable[[], None] = _nothing
    shut: Callable[[ProcessNeeds | None], None] = _nothing
