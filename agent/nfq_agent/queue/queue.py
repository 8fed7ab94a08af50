"""The queue of a program: packets from NFQUEUE in, verdicts out. It writes no rules and knows nothing of the agent around it.

Every packet that was read gets exactly one verdict, also when a callback raises, forgets it, or the queue is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import socket as sockets
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, Self

from nfq_agent.host.nfqueue import messages
from nfq_agent.host.nfqueue.channel import Channel
from nfq_agent.host.nfqueue.messages import Flag, FlowKey, Run
from nfq_agent.host.nfqueue.statistics import QueueStatistics, statistics
from nfq_agent.packet import Packet
from nfq_agent.verdict import ACCEPT, Action, RewriteError, Verdict, VerdictError

Copy = Literal["packet", "meta"]
Family = Literal["unspec", "inet", "inet6"]
Callback = Callable[[Packet], Verdict]

# Packets a turn: enough to share the cost of a system call, few enough that none waits long for its verdict.
BUDGET: Final = 256
# Packets that are answered at once where they are answered as they come: who sent them waits for it.
_TOGETHER: Final = 64
# How long a wait may last before the loop looks around, in seconds.
_LONGEST_WAIT: Final = 60.0
# Ids are compared as a difference of 32 bits with a sign (nfqnl_recv_verdict_batch()): this far on covers all that wait,
# older and newer.
_FURTHEST: Final = 1 << 30


class QueueError(Exception):
    """Something that the queue `number` can't do. The subclasses say what."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(number, reason)
        self.number = number
        self.reason = reason

    def __str__(self) -> str:
        return f"queue {self.number}: {self.reason}"


class QueueStateError(QueueError):
    """A call out of order: before open, after close, twice, or while another thread runs the queue."""


class QueueBusyError(QueueError):
    """The number is bound by somebody else."""


class QueuePermissionError(QueueError):
    """The process lacks CAP_NET_ADMIN."""


class QueueSettingError(QueueError):
    """The kernel refused a setting. setting: its name. value: what was asked. errno: the kernel's answer."""

    def __init__(self, number: int, setting: str, value: object, code: int) -> None:
        super().__init__(number, f"the kernel refused {setting}={value!r}: {os.strerror(code)}")
        # So that it can be copied and pickled.
        self.args = (number, setting, value, code)
        self.setting = setting
        self.value = value
        self.errno = code


@dataclass(frozen=True, slots=True)
class QueueSettings:
    """What is in force, as the kernel acknowledged it. See `Queue` for each."""

    copy: Copy
    copy_range: int
    max_len: int
    fail_open: bool
    gso: bool
    uid_gid: bool


_FLAGS: Final = {"fail_open": Flag.FAIL_OPEN, "gso": Flag.GSO, "uid_gid": Flag.UID_GID}
_queues: weakref.WeakSet[Queue] = weakref.WeakSet()


class Queue:
    """One netfilter queue.

    number: 0 to 65535, as in the rule's `-j NFQUEUE --queue-num`. family: sent with the bind command; kernels since 3.8 give
    the queue whatever the rules send, of either family. copy: "packet", or "meta" for no payload. copy_range: bytes of each
    packet to copy, 1 to 65535 (65531 of them fit into a message). max_len: packets that may wait for a verdict.
    fail_open: let packets pass when that many wait, instead of dropping them. gso: take offloaded packets whole, up to
    64 KB, instead of having the kernel cut them; such packets can't be rewritten. uid_gid: ask for the sender's uid and gid.
    receive_buffer: bytes of the socket's buffer, also past net.core.rmem_max. on_unanswered: the verdict for a packet
    whose callback raised, that was retained for more than `unanswered_after` seconds, that was the oldest of more than
    `retain_limit` (default: half of max_len), or that waits when the queue is closed. socket: a netlink socket
    (`nfq_agent.host.nfqueue.channel.open_socket()`) made in another network namespace, whose queue this is then.

    `open` needs CAP_NET_ADMIN, `bind`, `configure` and every verdict too: the kernel asks both the process that opened the
    socket and the one that sends. Everything else can be given away in between.
    """

    def __init__(  # noqa: PLR0913  # one for each setting
        self,
        number: int,
        *,
        family: Family = "unspec",
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
        _check_settings(self._wanted)
        self._settings: QueueSettings | None = None
        self._wanted_buffer = receive_buffer
        self.receive_buffer = 0
        """Bytes of the receive buffer in force, once it is bound."""
        self._on_unanswered = on_unanswered
        self._unanswered_after = unanswered_after
        self._retain_limit = retain_limit
        self._given = socket
        self._channel: Channel | None = None
        self._process = 0
        # Guards verdicts: a batch answers whatever is older, so no single answer may be on its way meanwhile.
        self._lock = threading.Lock()
        self._held: dict[int, tuple[Packet, float]] = {}
        self._bond = _Bond(self)
        # Read, and not yet looked at.
        self._backlog: deque[Packet] = deque()
        # What the callback has answered in this turn, and the packet that it is asked about.
        self._decided: list[tuple[Packet, Verdict]] = []
        self._asking: Packet | None = None
        # The latest packet read, and the latest for which no verdict is owed, other than to those that are retained.
        self._last = 0
        self._settled = 0
        self._interrupted = False
        self._stop = False
        # What runs it, and in which thread.
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
            raise QueueStateError(self.number, "it is open already")
        try:
            self._channel = Channel(self._given, self._family)
        except OSError as error:
            # NetfilterQueue's own words for it carry no errno.
            if error.errno in (None, errno.EPERM, errno.EACCES):
                raise QueuePermissionError(self.number, "opening it needs root or CAP_NET_ADMIN") from error
            raise QueueError(self.number, f"the netlink socket can't be opened: {error}") from error
        self._process = os.getpid()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._channel.fileno(), select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)
        _queues.add(self)
        return self

    def bind(self) -> Self:
        """Bind the number and put every setting into force, each acknowledged by the kernel.

        Raises QueueBusyError, QueuePermissionError, QueueSettingError (the queue is not bound then), QueueStateError.
        """
        channel = self._opened()
        if self._settings is not None:
            raise QueueStateError(self.number, "it is bound already")
        wanted = self._wanted
        mode = messages.COPY_MODES[wanted.copy]
        try:
            channel.bind(self.number, self._family, mode, wanted.copy_range, wanted.max_len)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise QueueBusyError(
                    self.number, "somebody else has bound it; /proc/net/netfilter/nfnetlink_queue says who, by its port id"
                ) from error
            if error.errno == errno.EPERM:
                raise QueuePermissionError(self.number, "binding it needs CAP_NET_ADMIN") from error
            raise QueueError(self.number, f"it can't be bound: {error}") from error
        # NetfilterQueue sets one of its own when it binds.
        self.receive_buffer = channel.set_receive_buffer(self._wanted_buffer)
        self._last = self._settled = 0
        # A packet that NetfilterQueue took is answered by policy before the first turn.
        self._interrupted = channel.passed_over
        self._bond = _Bond(self)
        # What NetfilterQueue set up: no flag, and a range that it has clamped.
        self._settings = QueueSettings(wanted.copy, 0, 0, False, False, False)
        try:
            self._configure(wanted)
        except BaseException:
            with contextlib.suppress(OSError):
                self.unbind()
            raise
        return self

    def unbind(self) -> None:
        """Answer what waits by policy and give the number back. Raises QueueStateError if it is not bound."""
        channel = self._bound()
        if self._runner not in (None, threading.get_ident()):
            raise QueueStateError(self.number, "another thread runs it; stop it first")
        ours = self._process == os.getpid()
        with self._lock:
            self.unanswered += len(self._held) + len(self._backlog)
            if ours:
                # Read or not, whatever waits would die with the queue.
                channel.answer_up_to((self._last + _FURTHEST) & 0xFFFFFFFF, self._on_unanswered)
            else:
                waiting = [packet for packet, _ in self._held.values()] + list(self._backlog)
                channel.answer_each([(packet.id, self._on_unanswered) for packet in waiting])
            self._forget()
            self._bond.end()
            self._settings = None
        if ours:
            channel.unbind()

    def _forget(self) -> None:
        for packet, _ in self._held.values():
            packet._queue = None
        for packet in self._backlog:
            packet._queue = None
        self._held.clear()
        self._backlog.clear()
        self._interrupted = False

    def close(self) -> None:
        """Unbind if bound, and close the socket. A second close does nothing. In a forked child the queue stays the parent's."""
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

    @property
    def running(self) -> bool:
        """True while `run` or an iteration is under way, in whichever thread."""
        return self._run is not None

    def fileno(self) -> int:
        """The descriptor that is readable when packets wait, for a loop of one's own around `read` and `answer`."""
        return self._opened().fileno()

    def _forked(self) -> None:
        """In a child process: the queue is the parent's, which alone unbinds it; the child may read and answer."""
        self._lock = threading.Lock()
        self._forget()
        self._jobs.clear()
        self._run = self._runner = None
        self._stop = False
        if self._channel is not None:
            self._channel.keep()
            # A descriptor that both share would wake the wrong one.
            os.close(self._wake)
            self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def leave_to_child(self) -> None:
        """After a fork whose child serves the queue: what this process has read and not looked at is the child's."""
        self._opened().forget_pending()

    # Settings.

    @property
    def settings(self) -> QueueSettings:
        """What the kernel has acknowledged."""
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
        """Change what is given, from any thread, while packets flow; none is lost. Returns what is in force then.

        Raises QueueSettingError with the name of the first one that the kernel refused; those before it are in force.
        """
        changes = {
            name: value
            for name, value in (
                ("copy", copy), ("copy_range", copy_range), ("max_len", max_len), ("fail_open", fail_open), ("gso", gso),
                ("uid_gid", uid_gid),
            )
            if value is not None
        }  # fmt: skip
        _check_settings(self._with(changes))
        # What the others are is asked then and there: another thread may have changed one meanwhile.
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
        for name, flag in _FLAGS.items():
            value: bool = getattr(wanted, name)
            if value != getattr(now, name):
                ask(lambda flag=flag, value=value: channel.set_flag(flag, value), **{name: value})  # type: ignore[misc]  # bound early

    def confirm(self) -> None:
        """Ask the kernel whether this process may answer packets. Raises QueuePermissionError if not (see `Queue`)."""
        channel = self._bound()
        try:
            self._on_runner(channel.confirm)
        except PermissionError as error:
            raise QueuePermissionError(self.number, "answering packets needs CAP_NET_ADMIN") from error

    def _on_runner(self, job: Callable[[], None]) -> None:
        """Do it now, or have the thread that reads the socket do it: the answer comes in among the packets."""
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
                # Nobody else may read the answer: neither another thread that asks nor a run that begins.
                work()
        if elsewhere:
            done.wait()
        if failure:
            raise failure[0]

    def statistics(self, process: int | Literal["self"] = "self") -> QueueStatistics:
        """What the kernel counts for this queue. Root only (PermissionError). Raises QueueError if the kernel has no such queue.

        process: one that lives in the queue's network namespace, if that is another than the caller's.
        """
        found = statistics(process).get(self.number)
        if found is None:
            raise QueueError(self.number, "the kernel has no such queue in this network namespace")
        return found

    # Reading and answering, turn by turn.

    def read(self, budget: int = BUDGET) -> list[Packet]:
        """At most `budget` packets that wait, without waiting for any. Each must be put into `answer`, or answered itself."""
        channel = self._bound()
        if self._backlog:
            packets = list(self._backlog)
            self._backlog.clear()
            return packets
        if not self._interrupted:
            self._settled = self._last
        elif channel.taken is not None:
            # That of the turn before, however far it came.
            self._last = channel.taken
        try:
            packets = channel.read(budget)
            if packets:
                if self._interrupted:
                    self._settle(packets[0].id)
                self._last = packets[-1].id
                for packet in packets:
                    packet._queue = self._bond
            elif self._interrupted:
                # The one after the latest may be what a loop was about to show us.
                self._settle(self._last + 2)
        except BaseException:
            self._interrupted = True
            raise
        return packets

    def _settle(self, before: int) -> None:
        """Answer by policy what a turn took that was broken off, by a signal's exception say: all since the one before it."""
        while 0 < (left := (before - self._settled - 1) & 0xFFFFFFFF) < 1 << 31:
            # Little by little, so that it gets on even if it is broken off as well.
            numbers = [(self._settled + step) & 0xFFFFFFFF for step in range(1, min(left, 64) + 1)]
            with self._lock:
                # Those that have their verdict are no longer known to the kernel, which says so, to nobody.
                self._bound().answer_each([(one, self._on_unanswered) for one in numbers if one not in self._held])
                self._settled = numbers[-1]
        self._last = self._settled
        self._interrupted = False

    def _answer_by_policy(self, packets: Sequence[Packet]) -> None:
        with self._lock:
            self.unanswered += len(packets)
            self._bound().answer_each([(packet.id, self._on_unanswered) for packet in packets])
            for packet in packets:
                packet._queue = None
                self._held.pop(packet.id, None)

    def answer(self, answers: Sequence[tuple[Packet, Verdict]]) -> None:
        """Give the verdicts of packets that were just read, in the order in which they were; RETAIN keeps one for later.

        All of them must have passed `check`.
        """
        channel = self._bound()
        with self._lock:
            given: list[tuple[int, Verdict]] = []
            bond = self._bond
            for packet, verdict in answers:
                if packet._queue is not bond:
                    continue
                if verdict.action is Action.RETAIN:
                    self._held[packet.id] = packet, time.monotonic() + self._unanswered_after
                    continue
                packet._queue = None
                given.append((packet.id, verdict))
            # A batch answers everything up to its number: not while an older one is to wait.
            if self._held or len(given) < 2:
                channel.answer_each(given)
            else:
                channel.answer_runs(_runs(given))

    def check(self, packet: Packet, verdict: object) -> None:
        """Raise VerdictError or RewriteError unless this packet can be given this verdict."""
        if not isinstance(verdict, Verdict):
            raise VerdictError(f"packet {packet.id}: {verdict!r} is no verdict; allowed: a Verdict, or RETAIN to answer later")
        if verdict.payload is None:
            return
        if not 0 < len(verdict.payload) <= messages.MAX_PAYLOAD:
            raise RewriteError(
                f"packet {packet.id}: {len(verdict.payload)} bytes; allowed: 1 to {messages.MAX_PAYLOAD}, what a message holds"
            )
        if packet.truncated:
            raise RewriteError(
                f"packet {packet.id}: {len(packet.payload)} of its {packet.length} bytes were copied; set a larger copy_range"
            )
        if packet.gso:
            raise RewriteError(f"packet {packet.id} is offloaded and not cut into segments yet; rewriting needs gso=False")

    def verdict(self, packet: Packet, verdict: Verdict) -> None:
        """Give one packet its verdict now, from any thread. Raises VerdictError, RewriteError, QueueStateError."""
        if self._decided and self._runner == threading.get_ident():
            # In a callback: those that it has answered before come before.
            self._send_decided()
        with self._lock:
            channel = self._bound()
            self.check(packet, verdict)
            _at_once(packet, verdict)
            if packet._queue is not self._bond:
                # Another thread was quicker.
                raise VerdictError(f"packet {packet.id} has its verdict already")
            if verdict.action is Action.RETAIN:
                return
            channel.answer(packet.id, verdict)
            packet._queue = None
            self._held.pop(packet.id, None)

    def skim(self, verdict: Verdict, budget: int = BUDGET) -> int:
        """Give up to `budget` packets that wait the same verdict, unseen: how many they were. The quickest way there is."""
        try:
            count, first, last = self._bound().skim(budget)
            if count:
                self._answer_runs([(last, count, verdict)], first)
        except BaseException:
            self._interrupted = True
            raise
        return count

    def skim_each(self, verdict: Verdict, budget: int = BUDGET) -> int:
        """Wait for packets and give all the same verdict as they come, until none has come for a while (`be_patient`), `budget`
        have, or 50 milliseconds have passed: how many they were. Quicker than `skim` where they come few at a time."""
        try:
            count, first, last = self._bound().skim_each(budget, verdict, self._together())
            if count:
                self._answered(first, last)
        except BaseException:
            self._interrupted = True
            raise
        return count

    def _together(self) -> int:
        """How many may be answered at once: one, where a batch would answer older ones that wait for another verdict."""
        return 1 if self._held or self._backlog or self._interrupted else _TOGETHER

    def be_patient(self, seconds: float, spin: float = 0.0) -> None:
        """How long the methods that answer each packet as it comes wait for one: asleep, or looking all the time if `spin`."""
        self._bound().be_patient(seconds, spin)

    def sort(
        self,
        known: dict[FlowKey, Verdict],
        decide: Callable[[Packet, FlowKey | None], Verdict],
        budget: int = BUDGET,
        each: bool = False,
    ) -> tuple[int, list[Run]]:
        """Answer up to `budget` packets with verdicts looked up by five-tuple, hook and interfaces.

        `decide` is asked for those not in `known`, and puts what may be kept there under the key that it is given. It must
        not raise, and its verdicts change nothing and retain nothing; when it was asked 256 times, the turn ends. Returns how
        many packets, and the runs of equal verdicts: id of the last, how many, verdict. each: wait and answer as `skim_each`
        does.
        """
        try:
            count, first, runs = self._bound().sort(budget, known, decide, self._together() if each else 0)
            if count and each:
                self._answered(first, runs[-1][0])
            elif count:
                self._answer_runs(runs, first)
        except BaseException:
            # By a signal, say: what the turn took is settled in the next one.
            self._interrupted = True
            raise
        return count, runs

    def _answered(self, first: int, last: int) -> None:
        if self._interrupted:
            self._settle(first)
        self._last = self._settled = last

    def _answer_runs(self, runs: list[Run], first: int) -> None:
        channel = self._bound()
        if self._interrupted:
            self._settle(first)
        with self._lock:
            if self._held:
                raise QueueStateError(self.number, "packets are retained; a batch would answer them too")
            self._last = self._settled = runs[-1][0]
            channel.answer_runs(runs)

    def answer_lost(self, below: int, verdict: Verdict) -> None:
        """Answer every packet with a number up to `below` that still waits: another process took them and died.

        Only before anything was retained.
        """
        with self._lock:
            if self._held:
                raise QueueStateError(self.number, "packets are retained; a batch would answer them too")
            self._bound().answer_up_to(below, verdict)

    @property
    def kernel(self) -> Self:
        """The queue itself (see `nfq_agent.service.packet_source`)."""
        return self

    def start(self, control: int) -> None:
        """Confirm that this process may answer; `wait` also returns when `control` is readable. Raises QueuePermissionError."""
        self.confirm()
        self._poll.register(control, select.POLLIN)

    def wait(self, timeout: float | None = None) -> list[int]:
        """Wait until packets are there, `stop` is called or `timeout` seconds have passed; the readable descriptors.

        Also answers by policy what was retained for too long.
        """
        channel = self._bound()
        if channel.pending or self._backlog:
            return [channel.fileno()]
        limit = self._answer_late()
        if timeout is not None:
            limit = min(limit, timeout)
        ready = [descriptor for descriptor, _ in self._poll.poll(limit * 1000)]
        if self._wake in ready:
            ready.remove(self._wake)
            self._woken()
        return ready

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def finish(self) -> None:
        """Answer by policy what is retained, or read and not looked at."""
        self._answer_by_policy([packet for packet, _ in self._held.values()] + list(self._backlog))
        self._backlog.clear()

    def drops(self) -> int:
        """Messages that did not fit into the receive buffer since the queue was opened."""
        return self._bound().drops()

    @property
    def last(self) -> int:
        """The number of the latest packet that was read; 0 before the first."""
        return self._last

    def _answer_late(self) -> float:
        """Answer by policy what was retained for too long, or is too much; seconds until there may be more to do."""
        if not self._held:
            return _LONGEST_WAIT
        now = time.monotonic()
        limit = self._wanted.max_len // 2 if self._retain_limit is None else self._retain_limit
        late: list[Packet] = []
        left = _LONGEST_WAIT
        with self._lock:
            # In the order in which they were retained.
            for number, (packet, deadline) in enumerate(self._held.values()):
                if deadline > now and len(self._held) - number <= limit:
                    left = deadline - now
                    break
                late.append(packet)
            # Counted before it can be seen to have passed.
            self.unanswered += len(late)
            self._bound().answer_each([(packet.id, self._on_unanswered) for packet in late])
            for packet in late:
                packet._queue = None
                del self._held[packet.id]
        return left

    # Running.

    def run(self, callback: Callback) -> None:
        """Put each packet to `callback` and give it the verdict that it returns, until `stop`.

        RETAIN keeps the packet; it is answered later by its own methods. What the callback raises comes out of `run`: that
        packet got `on_unanswered`, those before it their verdicts, and those that were read behind it come first when `run` is
        called again. Raises QueueStateError if it runs already.
        """
        run = object()
        try:
            self._begin(run)
            while not self._stopped():
                if self._backlog:
                    self._put_to(callback)
                elif packets := self.read():
                    self._backlog.extend(packets)
                else:
                    self.wait()
            self._stop = False
        except BaseException:
            self._interrupted = self._run is run
            raise
        finally:
            self._end(run)

    def _put_to(self, callback: Callback) -> None:
        packets = self._backlog
        try:
            while packets:
                # Until the callback has answered, policy is this packet's answer.
                packet = self._asking = packets[0]
                packets.popleft()
                if not _answered(packet):
                    verdict = callback(packet)
                    self.check(packet, verdict)
                    _at_once(packet, verdict)
                    if _answered(packet) and verdict.action is not Action.RETAIN:
                        raise VerdictError(f"packet {packet.id} has its verdict already")
                    self._decided.append((packet, verdict))
                self._asking = None
        finally:
            if self._asking is not None:
                self._decided.append((self._asking, self._on_unanswered))
                self._asking = None
                self.unanswered += 1
            self._send_decided()

    def _send_decided(self) -> None:
        decided, self._decided = self._decided, []
        self.answer(decided)

    def __iter__(self) -> Iterator[Packet]:
        """The packets, each to be answered by its own methods, at once or later; until `stop`."""
        run = object()
        try:
            self._begin(run)
            while not self._stopped():
                if self._backlog:
                    yield self._held_back()
                elif packets := self.read():
                    self._backlog.extend(packets)
                else:
                    self.wait()
            self._stop = False
        finally:
            self._end(run)

    def __aiter__(self) -> AsyncIterator[Packet]:
        """The same in an event loop of asyncio, which goes on while no packet waits."""
        return _Awaited(self)

    def _held_back(self) -> Packet:
        packet = self._backlog.popleft()
        with self._lock:
            self._held[packet.id] = packet, time.monotonic() + self._unanswered_after
        return packet

    async def _readable(self) -> None:
        if self._bound().pending:
            return
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        descriptors = self.fileno(), self._wake
        for descriptor in descriptors:
            loop.add_reader(descriptor, ready.set)
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ready.wait(), self._answer_late())
        finally:
            for descriptor in descriptors:
                loop.remove_reader(descriptor)
            self._woken()

    def _begin(self, run: object) -> None:
        self._bound()
        with self._lock:
            if self._run is not None:
                raise QueueStateError(self.number, "it runs already")
            self._runner = threading.get_ident()
            self._run = run

    def _end(self, run: object) -> None:
        # Also when a signal's exception came between two steps of a run.
        if self._run is run:
            self._run = None
            self._runner = None
            if self._decided or self._asking is not None:
                self._interrupted = True
            with self._lock:
                pass
            # What another thread asked for just before.
            self._work()

    def _stopped(self) -> bool:
        if self._jobs:
            self._work()
        if self._held:
            self._answer_late()
        return self._stop

    def _work(self) -> None:
        while self._jobs:
            self._jobs.popleft()()

    def stop(self) -> None:
        """End `run` or the iteration after its turn; from any thread or signal handler. Before `run`, it ends the next one."""
        self._stop = True
        self._notify()

    def _notify(self) -> None:
        if self._channel is not None:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(self._wake, 1)


class _Bond:
    """What a packet knows of its queue: numbers begin anew with each bind, and an old packet must not answer a new one."""

    __slots__ = ("_queue",)

    def __init__(self, queue: Queue) -> None:
        self._queue: Queue | None = queue

    def verdict(self, packet: Packet, verdict: Verdict) -> None:
        """Give the verdict. Raises what `Queue.verdict` does."""
        if self._queue is None:
            raise VerdictError(f"packet {packet.id} waits for no verdict: its queue was unbound since, and answered it by policy")
        self._queue.verdict(packet, verdict)

    def end(self) -> None:
        """The queue is bound no more."""
        self._queue = None


class _Awaited:
    """An asynchronous iteration. No generator: one that a `break` leaves ends only when the event loop comes round to it."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._run: object = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Packet:
        queue = self._queue
        if self._run is None:
            run = object()
            queue._begin(run)
            self._run = run
        try:
            while not queue._stopped():
                if queue._backlog:
                    return queue._held_back()
                if packets := queue.read():
                    queue._backlog.extend(packets)
                else:
                    await queue._readable()
            queue._stop = False
        except BaseException:
            self._end()
            raise
        self._end()
        raise StopAsyncIteration

    def _end(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            self._queue._end(run)

    __del__ = _end


def _at_once(packet: Packet, verdict: Verdict) -> None:
    if verdict.delay or verdict.inject:
        raise VerdictError(
            f"packet {packet.id}: only the agent's worker delays verdicts and sends packets besides; here, retain the packet"
        )


def _answered(packet: Packet) -> bool:
    return packet._queue is None


def _runs(answers: Sequence[tuple[int, Verdict]]) -> list[Run]:
    """Neighbours that one message can answer: the same verdict, without a payload."""
    runs: list[Run] = []
    last, current = answers[0]
    count = 0
    for identity, verdict in answers:
        if verdict is not current and (verdict != current or verdict.payload is not None):
            runs.append((last, count, current))
            current, count = verdict, 0
        elif count and verdict.payload is not None:
            runs.append((last, count, current))
            count = 0
        last = identity
        count += 1
    runs.append((last, count, current))
    return runs


def _check_settings(settings: QueueSettings) -> None:
    copy: str = settings.copy
    if copy not in messages.COPY_MODES:
        reason = ": with mode none the kernel loses every packet of the queue" if copy == "none" else ""
        raise ValueError(f"copy {copy!r}{reason}; allowed: packet, meta")
    if not 1 <= settings.copy_range <= 0xFFFF:
        raise ValueError(f"copy_range {settings.copy_range}; allowed: 1 to 65535")
    if not 1 <= settings.max_len <= 0xFFFFFFFF:
        raise ValueError(f"max_len {settings.max_len}; allowed: 1 to 4294967295")


def _after_fork() -> None:
    for queue in list(_queues):
        queue._forked()


os.register_at_fork(after_in_child=_after_fork)
