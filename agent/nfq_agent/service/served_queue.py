"""One bound queue number of a worker: its socket and settings, which outlive the worker's process."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from nfq_agent.host.nfqueue.statistics import QueueStatistics, statistics
from nfq_agent.log import Log
from nfq_agent.queue.errors import QueueSettingError
from nfq_agent.queue.settings import FLAGS, QueueSettings
from nfq_agent.queue.turns import WorkerQueue
from nfq_agent.service.store import Store
from nfq_agent.verdict import Verdict


class ServedQueue:
    """One queue number. wanted: the settings that are to be in force."""

    def __init__(self, number: int, wanted: QueueSettings, on_unanswered: Verdict, log: Log) -> None:
        self.number = number
        self.wanted = wanted
        self.queue: WorkerQueue | None = None
        self._on_unanswered = on_unanswered
        self._log = log

    def open(self) -> None:
        """Bind it and set it up. A flag that this kernel refuses is logged and left off. Raises QueueError."""
        queue = self._unbound().open()
        try:
            queue.bind()
        except BaseException:
            queue.close()
            raise
        self.queue = queue
        self._set_flags(queue)

    def _unbound(self) -> WorkerQueue:
        wanted = self.wanted
        return WorkerQueue(
            self.number,
            copy=wanted.copy,
            copy_range=wanted.copy_range,
            max_len=wanted.max_len,
            on_unanswered=self._on_unanswered,
        )

    def inherit(self, store: Store, kind: str, settings: object) -> bool:
        """Take over the bound queue that the store has. settings: as `noted` there. False if it has none."""
        descriptor = store.take(f"{kind}-{self.number}")
        if descriptor is None:
            return False
        self.queue = self._unbound().adopt(descriptor, _settings(settings))
        return True

    @property
    def noted(self) -> dict[str, Any] | None:
        """The settings in force, for `inherit`."""
        return None if self.queue is None else asdict(self.queue.settings)

    @property
    def fits(self) -> bool:
        """Whether the settings in force are those that are wanted."""
        return self.queue is not None and self.queue.settings == self.wanted

    def refit(self) -> None:
        """Put the wanted settings into force. Nothing may read from the queue. Raises QueueError."""
        assert self.queue is not None
        self.queue.configure(copy=self.wanted.copy, copy_range=self.wanted.copy_range, max_len=self.wanted.max_len)
        self._set_flags(self.queue)

    def _set_flags(self, queue: WorkerQueue) -> None:
        for flag in FLAGS:
            wanted = getattr(self.wanted, flag)
            if wanted == getattr(queue.settings, flag):
                continue
            try:
                queue.configure(**{flag: wanted})
            except QueueSettingError as error:
                self._log(f"{error}; the queue works without it", "warning", queue=self.number)

    def leave_to_child(self) -> None:
        """After a fork: the child reads it (see `WorkerQueue.leave_to_child`)."""
        if self.queue is not None:
            self.queue.leave_to_child()

    def to_read(self, cuts: bool) -> WorkerQueue | None:
        """The bound queue, for the process that reads it. cuts: packets of many datagrams are cut."""
        if cuts and self.queue is not None and self.queue.settings.gso:
            self.queue.cut_joined()
        return self.queue

    def close(self) -> None:
        """Unbind it, if it is bound. Packets that still wait in it are lost."""
        if self.queue is not None:
            self.queue.close()
            self.queue = None

    @property
    def descriptors(self) -> set[int]:
        """Those of its socket."""
        return set() if self.queue is None else self.queue.descriptors

    def statistics(self) -> QueueStatistics | None:
        """The kernel's figures for it; None if it does not show them to this process."""
        try:
            return statistics().get(self.number)
        except OSError:
            return None

    @property
    def waiting(self) -> bool:
        """Whether a packet waits for its verdict. False where the kernel does not show it."""
        line = self.statistics()
        return line is not None and line.waiting > 0

    def order_below(self) -> int | None:
        """Up to which number a process that has ended may have left packets without a verdict."""
        line = self.statistics()
        return None if line is None else line.id_sequence

    def give_away(self) -> WorkerQueue | None:
        """Give the bound queue to the caller: it no longer belongs to this object."""
        queue, self.queue = self.queue, None
        return queue


def _settings(noted: object) -> QueueSettings:
    """The settings of a queue as another process noted them; a setting that was not noted differs from any wanted one."""
    unknown: dict[str, Any] = {
        "copy": "packet", "copy_range": 0, "max_len": 0, "fail_open": False, "gso": False, "uid_gid": False,
    }  # fmt: skip
    return QueueSettings(**(unknown | (noted if isinstance(noted, dict) and noted.keys() == unknown.keys() else {})))
