"""The life of a queue: open, bind, configure, unbind, close. It does not read packets.

Packets that wait when the queue is unbound are answered by policy, read or not.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket as sockets
import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final, Literal, Self

from nfq_agent.host.nfqueue import messages
from nfq_agent.host.nfqueue.channel import Channel
from nfq_agent.host.nfqueue.statistics import QueueStatistics, statistics
from nfq_agent.packet import Packet
from nfq_agent.queue.errors import QueueBusyError, QueueError, QueuePermissionError, QueueSettingError, QueueStateError
from nfq_agent.queue.ledger import Bond, Ledger
from nfq_agent.queue.settings import FLAGS, BoundFamily, Copy, QueueSettings, check_settings
from nfq_agent.verdict import ACCEPT, Action, Verdict

# Ids are compared as a difference of 32 bits with a sign (nfqnl_recv_verdict_batch()): each of these covers one half of all.
# A process that did not read the waiting ones does not know in which half they are.
_HALVES: Final = (1 << 30, 3 << 30)

_queues: weakref.WeakSet[Binding] = weakref.WeakSet()


class Binding(ABC):
    """One netfilter queue of a process, from `open` to `close`. See `Queue` for the settings."""

    def __init__(  # noqa: PLR0913  # one for each setting
        self,
        number: int,
        *,
        family: BoundFamily = "unspec",
        copy: Copy = "packet",
        copy_range: int = 65535,
        max_len: int = 4096,
        fail_open: bool = False,
        gso: bool = False,
        uid_gid: bool = False,
        receive_buffer: int = 8 << 20,
        on_unanswered: Verdict = ACCEPT,
        unanswered_after: float = 5.0,
        retain_limit: int | None = None,
        socket: sockets.socket | None = None,
    ) -> None:
        if not 0 <= number <= 0xFFFF:
            raise ValueError(f"queue {number}: a queue number is 0 to 65535")
        if family not in messages.FAMILIES:
            raise ValueError(f"family {family!r}: allowed: unspec, inet, inet6")
        if not on_unanswered.plain or on_unanswered.action is Action.RETAIN:
            raise ValueError("on_unanswered is a verdict that changes nothing: ACCEPT, DROP or REPEAT")
        self.number = number
        self._family = messages.FAMILIES[family]
        self._wanted = QueueSettings(copy, copy_range, max_len, fail_open, gso, uid_gid)
        check_settings(self._wanted)
        self._settings: QueueSettings | None = None
        self._wanted_buffer = receive_buffer
        self.receive_buffer = 0
        """Bytes of the receive buffer in force, once it is bound."""
        self._on_unanswered = on_unanswered
        self._given = socket
        self._channel: Channel | None = None
        self._process = 0
        # Guards verdicts: a batch answers every older packet, so no single answer may be sent at the same time.
        self._lock = threading.Lock()
        self._ledger = Ledger(unanswered_after, max_len // 2 if retain_limit is None else retain_limit)
        self._bond = Bond(self)
        self._stop = False
        # The run or iteration under way, and its thread.
        self._run: object = None
        self._runner: int | None = None
        self._jobs: deque[Callable[[], None]] = deque()
        self._poll = select.poll()
        self._wake = -1
        self.unanswered = 0
        """Packets that the policy answered."""

    # Life.

    def open(self) -> Self:
        """Open the netlink socket. Raises QueuePermissionError, QueueStateError."""
        if self._channel is not None:
            raise QueueStateError(self.number, "it is already open")
        try:
            channel = Channel(self._given, self._family)
        except OSError as error:
            # NetfilterQueue's own exception has no errno.
            if error.errno in (None, errno.EPERM, errno.EACCES):
                raise QueuePermissionError(self.number, "opening it needs root or CAP_NET_ADMIN") from error
            raise QueueError(self.number, f"the netlink socket cannot be opened: {error}") from error
        self._opened_as(channel)
        return self

    def _opened_as(self, channel: Channel) -> None:
        self._channel = channel
        self._process = os.getpid()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(channel.fileno(), select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)
        _queues.add(self)

    def bind(self) -> Self:
        """Bind the number and put every setting into force, each acknowledged by the kernel.

        Raises QueueBusyError, QueuePermissionError, QueueSettingError (the queue is not bound then), QueueStateError.
        """
        channel = self._opened()
        if self._settings is not None:
            raise QueueStateError(self.number, "it is already bound")
        wanted = self._wanted
        mode = messages.COPY_MODES[wanted.copy]
        try:
            channel.bind(self.number, self._family, mode, wanted.copy_range, wanted.max_len)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise QueueBusyError(
                    self.number,
                    "another process has already bound this queue; /proc/net/netfilter/nfnetlink_queue has its port id",
                ) from error
            if error.errno == errno.EPERM:
                raise QueuePermissionError(self.number, "binding it needs CAP_NET_ADMIN") from error
            raise QueueError(self.number, f"the queue cannot be bound: {error}") from error
        # NetfilterQueue sets another size when it binds.
        self.receive_buffer = channel.set_receive_buffer(self._wanted_buffer)
        self._bond = Bond(self)
        # A packet that NetfilterQueue took is answered by policy in the first turn.
        self._ledger.begin(self._bond, channel.passed_over)
        # NetfilterQueue sets no flag, and a smaller range.
        self._settings = QueueSettings(wanted.copy, 0, 0, False, False, False)
        try:
            self._configure(wanted)
        except BaseException:
            with contextlib.suppress(OSError):
                self.unbind()
            raise
        return self

    def unbind(self) -> None:
        """Answer by policy the packets that wait, and unbind the number. Raises QueueStateError if it is not bound."""
        channel = self._bound()
        if self._runner not in (None, threading.get_ident()):
            raise QueueStateError(self.number, "another thread runs it; call stop() first")
        ours = self._process == os.getpid()
        with self._lock:
            waiting = self._ledger.waiting
            self.unanswered += len(waiting)
            if ours:
                # Read or not: a packet that still waits is lost with the queue.
                for half in _HALVES:
                    channel.answer_up_to((self._ledger.last + half) & 0xFFFFFFFF, self._on_unanswered)
            else:
                channel.answer_each([(packet.id, self._on_unanswered) for packet in waiting])
            self._ledger.forget()
            self._bond.end()
            self._settings = None
        if ours:
            channel.unbind()

    def close(self) -> None:
        """Unbind if bound, and close the socket. A second close does nothing. In a forked child the parent keeps the queue."""
        if self._channel is None:
            return
        if self._settings is not None:
            self.unbind()
        channel, self._channel = self._channel, None
        _queues.discard(self)
        channel.close()
        os.close(self._wake)

    def __enter__(self) -> Self:
        if self._channel is None:
            self.open()
        try:
            if self._settings is None:
                self.bind()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _opened(self) -> Channel:
        if self._channel is None:
            raise QueueStateError(self.number, "it is not open")
        return self._channel

    def _bound(self) -> Channel:
        channel = self._opened()
        if self._settings is None:
            raise QueueStateError(self.number, "it is not bound")
        return channel

    def fileno(self) -> int:
        """The descriptor that is readable when packets wait, for your own loop around `read` and `answer`."""
        return self._opened().fileno()

    def _forked(self) -> None:
        """In a child process: the queue is the parent's, which alone unbinds it; the child may read and answer."""
        self._lock = threading.Lock()
        self._ledger.forget()
        self._jobs.clear()
        self._run = self._runner = None
        self._stop = False
        if self._channel is not None:
            self._channel.keep()
            # A shared descriptor would wake the wrong process.
            os.close(self._wake)
            self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    # Settings.

    @property
    def settings(self) -> QueueSettings:
        """The settings that the kernel has acknowledged."""
        self._bound()
        assert self._settings is not None
        return self._settings

    def configure(
        self,
        *,
        copy: Copy | None = None,
        copy_range: int | None = None,
        max_len: int | None = None,
        fail_open: bool | None = None,
        gso: bool | None = None,
        uid_gid: bool | None = None,
    ) -> QueueSettings:
        """Change the given settings, from any thread, while packets flow; no packet is lost. Returns the settings in force.

        Raises QueueSettingError with the name of the first setting that the kernel refused; those before it are in force.
        """
        changes = {
            name: value
            for name, value in (
                ("copy", copy), ("copy_range", copy_range), ("max_len", max_len), ("fail_open", fail_open), ("gso", gso),
                ("uid_gid", uid_gid),
            )
            if value is not None
        }  # fmt: skip
        check_settings(self._with(changes))
        # The other settings are read at that moment: another thread may have changed one.
        self._on_runner(lambda: self._configure(self._with(changes)))
        return self.settings

    def _with(self, changes: Mapping[str, Any]) -> QueueSettings:
        return replace(self.settings, **changes)

    def _configure(self, wanted: QueueSettings) -> None:
        channel = self._bound()
        now = self.settings

        def ask(request: Callable[[], None], **change: Any) -> None:
            nonlocal now
            try:
                request()
            except OSError as error:
                name, value = next(iter(change.items()))
                raise QueueSettingError(self.number, name, value, error.errno or errno.EIO) from error
            now = self._settings = replace(now, **change)

        if (wanted.copy, wanted.copy_range) != (now.copy, now.copy_range):
            mode = messages.COPY_MODES[wanted.copy]
            changed = {"copy_range": wanted.copy_range, "copy": wanted.copy}
            if wanted.copy_range == now.copy_range:
                del changed["copy_range"]
            ask(lambda: channel.set_copy(mode, wanted.copy_range), **changed)
        if wanted.max_len != now.max_len:
            ask(lambda: channel.set_max_len(wanted.max_len), max_len=wanted.max_len)
        for name, flag in FLAGS.items():
            value: bool = getattr(wanted, name)
            if value != getattr(now, name):
                ask(lambda flag=flag, value=value: channel.set_flag(flag, value), **{name: value})  # type: ignore[misc]  # bound early

    def _on_runner(self, job: Callable[[], None]) -> None:
        """Do it now, or in the thread that reads the socket: the acknowledgement arrives among the packets."""
        done = threading.Event()
        failure: list[BaseException] = []

        def work() -> None:
            try:
                job()
            except BaseException as error:
                failure.append(error)
            done.set()

        with self._lock:
            elsewhere = self._runner is not None and self._runner != threading.get_ident()
            if elsewhere:
                self._jobs.append(work)
                self._notify()
            else:
                # No other thread may read the acknowledgement: not one that sends a request too, and not a run that begins.
                work()
        if elsewhere:
            done.wait()
        if failure:
            raise failure[0]

    def _work(self) -> None:
        while self._jobs:
            self._jobs.popleft()()

    def _notify(self) -> None:
        if self._channel is not None:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(self._wake, 1)

    def statistics(self, process: int | Literal["self"] = "self") -> QueueStatistics:
        """The kernel's figures for this queue. Root only (PermissionError). Raises QueueError if the kernel has no such queue.

        process: the pid of a process in the queue's network namespace, if the caller is in another one.
        """
        found = statistics(process).get(self.number)
        if found is None:
            raise QueueError(self.number, "the kernel has no such queue in this network namespace")
        return found

    @abstractmethod
    def verdict(self, packet: Packet, verdict: Verdict) -> None:
        """Send one packet's verdict now, from any thread."""


def _after_fork() -> None:
    for queue in list(_queues):
        queue._forked()


os.register_at_fork(after_in_child=_after_fork)
