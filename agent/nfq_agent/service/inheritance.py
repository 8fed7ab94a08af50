"""What the supervisor gets from the previous agent, and leaves to the next one, besides its workers (see crew, handover)."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Final

from nfq_agent.host.child import DRAIN, STOP, Child
from nfq_agent.host.nfqueue.statistics import statistics
from nfq_agent.log import Log
from nfq_agent.rules.foreign import InFront
from nfq_agent.service.live_rules import ListedRule
from nfq_agent.service.meter import Meter
from nfq_agent.service.store import Store

# Seconds for an unused queue to run empty, and for its process to end.
_DRAINS_WITHIN: Final = 2.0
_METER: Final = "meter"
# The note with the configuration in force.
CONFIGURATION: Final = "configuration"
# The note with the reload that waits for its confirmation.
TRIAL: Final = "trial"


class Inheritance:
    """pending: something of the previous agent serves until this one takes it over."""

    def __init__(self, store: Store, log: Log) -> None:
        self._store = store
        self._log = log
        self.pending = store.inherited
        self._draining: list[Child] = []

    @property
    def serves_on(self) -> bool:
        """Whether what the previous agent left keeps serving when this one ends before it took it over."""
        return self.pending and self._store.outlives

    def start_meter(self, meter: Meter, found: list[ListedRule], in_front: Iterable[InFront]) -> None:
        """Continue the counts of the previous agent, or begin at zero. in_front: foreign rules before ours."""
        try:
            meter.resume(self._store.noted(_METER))
            meter.read(found, whole=False)
        except (KeyError, TypeError, ValueError):
            meter.start(found, in_front)

    def keep(self, meter: Meter) -> None:
        """Note what was counted for the next agent, and reap processes that have drained."""
        self._draining = [child for child in self._draining if not child.reap()]
        try:
            self._store.note(_METER, meter.memo)
        except OSError as error:
            self._log(f"the next agent will not know what was counted: {error}", "warning")

    def keep_configuration(self, table: dict[str, Any]) -> None:
        """Note the configuration in force (Config.table): the next agent serves it if the files have a fault by then."""
        try:
            self._store.note(CONFIGURATION, table)
        except (OSError, TypeError) as error:
            self._log(f"the next agent will not know this configuration: {error}", "warning")

    @property
    def trial(self) -> dict[str, Any]:
        """The reload on trial that the previous agent left (Trial.resume); empty if there is none."""
        return self._store.noted(TRIAL)

    def keep_trial(self, trial: dict[str, Any] | None) -> None:
        """Note the reload on trial: the next agent takes it back in time."""
        try:
            self._store.note(TRIAL, trial)
        except (OSError, TypeError) as error:
            self._log(f"a restart would end the time for the confirmation: {error}", "warning")

    def taken(self, table: dict[str, Any]) -> None:
        """All that is wanted is taken over, and the rules are ours: end the rest. table: the configuration (Config.table)."""
        self.pending = False
        self.keep_configuration(table)
        for name in self._store.waiting("worker-"):
            number = name.rpartition("-")[2]
            child = Child.adopted(
                f"worker of queue {number}", self._store.take(name), self._store.noted(f"queue-{number}").get("process")
            )
            self._store.drop(name)
            self._store.note(f"queue-{number}", None)
            if child is not None:
                # Also what it had for known flows.
                for each in (number, *(name.rpartition("-")[2] for name in self._store.waiting("known-"))):
                    _run_empty(int(each))
                child.tell(STOP)
                if not child.wait_end(_DRAINS_WITHIN):
                    child.kill()
                child.reap(block=True)
                self._log(f"queue {number} of the previous agent is not wanted any more: its worker has ended")
        for name in (*self._store.waiting("proxy-"), *self._store.waiting("leaving-")):
            child = Child.adopted(name, self._store.take(name), self._store.noted(name).get("process"))
            self._store.drop(name)
            self._store.note(name, None)
            if child is not None:
                child.tell(DRAIN)
                # Without its control socket it would end at once.
                self._draining.append(child)
        for name in self._store.waiting(""):
            self._store.discard(name)

    def clear(self) -> None:
        """Leave nothing to the next agent."""
        try:
            self._store.clear()
        except OSError as error:
            self._log(f"the service manager was not told to close what it keeps: {error}", "error")


def _run_empty(number: int) -> None:
    """Return when no packet waits in a queue to which no rule leads, or after a while."""
    deadline = time.monotonic() + _DRAINS_WITHIN
    while time.monotonic() < deadline:
        try:
            line = statistics().get(number)
        except OSError:
            return
        if line is None or not line.waiting:
            return
        time.sleep(0.005)
