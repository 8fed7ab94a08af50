"""The bound queues of one worker: that of all packets, or of new flows, and beside it that of known flows.

The queue of known flows is there while one is wanted, and after that until no rule leads there any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nfq_agent.config.models import QueueConfig
from nfq_agent.counters import Counters
from nfq_agent.host.jail.calls import ProcessNeeds
from nfq_agent.log import Log
from nfq_agent.queue.paired import PairedQueue
from nfq_agent.queue.settings import QueueSettings
from nfq_agent.queue.turns import WorkerQueue
from nfq_agent.service.order import Order
from nfq_agent.service.served_queue import ServedQueue
from nfq_agent.service.store import Store
from nfq_agent.verdict import Verdict


class ServedQueues:
    """The one or two queues. number: of the first. wanted: the settings that are to be in force."""

    def __init__(self, number: int, config: QueueConfig, wanted: QueueSettings, on_unanswered: Verdict, log: Log) -> None:
        self.first = ServedQueue(number, wanted, on_unanswered, log)
        self._room_for_known = config.room_for_known
        self._on_unanswered = on_unanswered
        self._log = log
        # Each number of known flows stands as far above as the queue has numbers.
        self._known_number = number - config.numbers.start + config.numbers.stop
        self.known = self._known() if config.room_for_known else None

    def _known(self) -> ServedQueue:
        wanted = self.first.wanted
        wanted = replace(wanted, max_len=self._room_for_known or wanted.max_len)
        return ServedQueue(self._known_number, wanted, self._on_unanswered, self._log)

    @property
    def _all(self) -> list[ServedQueue]:
        return [self.first] if self.known is None else [self.first, self.known]

    def open(self) -> None:
        """Bind them and set them up. A flag that this kernel refuses is logged and left off. Raises QueueError."""
        try:
            for each in self._all:
                each.open()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unbind them. Packets that still wait in them are lost."""
        for each in self._all:
            each.close()

    def inherit(self, store: Store, noted: Mapping[str, Any]) -> bool:
        """Take over the bound queues that the store has. noted: as `noted` there. False if it does not have the first."""
        if not self.first.inherit(store, "queue", noted.get("settings")):
            return False
        # Rules still lead to the other, wanted or not.
        former = self.known or self._known()
        if former.inherit(store, "known", noted.get("known")):
            self.known = former
        elif self.known is not None:
            self.known.open()
        return True

    @property
    def noted(self) -> dict[str, Any]:
        """The settings in force, for `inherit`."""
        return {"settings": self.first.noted, "known": None if self.known is None else self.known.noted}

    @property
    def stored(self) -> dict[str, tuple[int, bool]]:
        """The bound sockets, as `Worker.stored`."""
        found: dict[str, tuple[int, bool]] = {}
        if self.first.queue is not None:
            found[f"queue-{self.first.number}"] = self.first.queue.fileno(), False
        if self.known is not None and self.known.queue is not None:
            found[_stored_name(self.known)] = self.known.queue.fileno(), False
        return found

    @property
    def fits(self) -> bool:
        """Whether the settings in force are those that are wanted."""
        return all(each.fits for each in self._all)

    def refit(self) -> None:
        """Put the wanted settings into force. Nothing may read from them. Raises QueueError."""
        for each in self._all:
            each.refit()

    def take_over(self, old: ServedQueues) -> None:
        """Take the bound queues of `old` over; no packet that waits in them is lost. Raises QueueError.

        Where no queue of known flows is wanted any more, it is served until the rules are gone.
        """
        self.first.queue = old.first.give_away()
        assert self.first.queue is not None
        if old.known is not None and old.known.queue is not None:
            self.known = self.known or self._known()
            self.known.queue = old.known.give_away()
        elif self.known is not None:
            self.known.open()

    @property
    def leftover(self) -> ServedQueue | None:
        """The queue of known flows, if none is wanted any more: to be closed when no rule leads there and no process reads it."""
        return None if self._room_for_known else self.known

    def close_leftover(self) -> list[str]:
        """Close it. Returns the names under which it is stored."""
        if (former := self.leftover) is None:
            return []
        self.known = None
        former.close()
        return [_stored_name(former)]

    def leave(self) -> None:
        """Leave them as they are to the agent that comes next."""
        for each in self._all:
            if each.queue is not None:
                each.queue.leave()

    def leave_to_child(self) -> None:
        """After a fork: the child reads them."""
        for each in self._all:
            each.leave_to_child()

    def lost(self, requeue: bool) -> Order:
        """The order to take over from a process that may have left packets without a verdict."""
        return Order(self.first.order_below(), requeue, None if self.known is None else self.known.order_below())

    def to_read(self, cuts: bool, counters: Counters) -> WorkerQueue | PairedQueue:
        """In the process: what it reads. cuts: packets of many datagrams are cut."""
        queue = self.first.to_read(cuts)
        assert queue is not None
        if self.known is not None and (known := self.known.to_read(cuts)) is not None:
            return PairedQueue(queue, known, counters)
        return queue

    def fix(self) -> ProcessNeeds:
        """In the process: what it may still do with the sockets, once it is confined."""
        needs = ProcessNeeds()
        for each in self._all:
            if each.queue is not None:
                headers, fixed = each.queue.fix()
                needs |= ProcessNeeds(sends=((fixed, headers),))
        return needs

    @property
    def descriptors(self) -> set[int]:
        """Those of the sockets."""
        return set().union(*(each.descriptors for each in self._all))

    @property
    def waiting(self) -> bool:
        """Whether a packet waits for its verdict. False where the kernel does not show it."""
        return any(each.waiting for each in self._all)


def _stored_name(known: ServedQueue) -> str:
    return f"known-{known.number}"
