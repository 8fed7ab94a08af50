"""The queue of a program: calls a callback for each packet, or iterates over them, until `stop`."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Self

from nfq_agent.packet import Packet
from nfq_agent.queue.bound import BoundQueue, check_immediate
from nfq_agent.queue.errors import QueueStateError
from nfq_agent.verdict import Verdict

Callback = Callable[[Packet], Verdict]


class Queue(BoundQueue):
    """One netfilter queue.

    number: 0 to 65535, as in the rule's `-j NFQUEUE --queue-num`. family: sent with the bind command; kernels since 3.8 give
    the queue whatever the rules send, of either family. copy: "packet", or "meta" for no payload. copy_range: bytes of each
    packet to copy, 1 to 65535 (65531 of them fit into a message). max_len: packets that may wait for a verdict.
    fail_open: let packets pass when that many wait, instead of dropping them. gso: take offloaded packets whole, up to
    64 KB, instead of having the kernel cut them; such packets cannot be rewritten. uid_gid: ask for the sender's uid and gid.
    receive_buffer: bytes of the socket's buffer, also past net.core.rmem_max. on_unanswered: the verdict for a packet
    whose callback raised, that was retained for more than `unanswered_after` seconds, that was the oldest of more than
    `retain_limit` (default: half of max_len), or that waits when the queue is closed. socket: a netlink socket
    (`nfq_agent.open_socket()`) made in another network namespace: the queue is then one of that namespace.

    `open`, `bind`, `configure` and every verdict need CAP_NET_ADMIN: the kernel checks the process that opened the socket and
    the one that sends. All other privileges can be dropped in between.
    """

    @property
    def running(self) -> bool:
        """True while `run` or an iteration is under way, in any thread."""
        return self._run is not None

    def run(self, callback: Callback) -> None:
        """Ask `callback` about each packet and send the verdict that it returns, until `stop`.

        RETAIN keeps the packet; its own methods answer it later. An exception of the callback leaves `run`: that packet got
        `on_unanswered`, those before it their verdicts, and the packets that were read after it come first when `run` is
        called again. Raises QueueStateError if it is already running.
        """
        run = object()
        try:
            self._begin(run)
            while not self._stopped():
                if self._ledger.read_ahead:
                    self._ask(callback)
                elif packets := self.read():
                    self._ledger.keep(packets)
                else:
                    self.wait()
            self._stop = False
        except BaseException:
            if self._run is run:
                self._ledger.interrupted = True
            raise
        finally:
            try:
                self._end(run)
            finally:
                # A signal handler may raise where the call begins, too: then nothing of it was done.
                self._end(run)

    def _ask(self, callback: Callback) -> None:
        ledger = self._ledger
        try:
            while (packet := ledger.ask()) is not None:
                verdict = callback(packet)
                self.check(packet, verdict)
                check_immediate(packet, verdict)
                ledger.decide(verdict)
        finally:
            self._send_undecided()

    def _send_undecided(self) -> None:
        """Send what the callback decided; the policy answers the packet that it was asked about and did not decide."""
        self.unanswered += self._ledger.abandon(self._on_unanswered)
        self.answer(self._ledger.take_decided())

    def __iter__(self) -> Iterator[Packet]:
        """Yield the packets until `stop`; each is answered by its own methods, at once or later."""
        run = object()
        try:
            self._begin(run)
            while not self._stopped():
                if self._ledger.read_ahead:
                    yield self._next_held()
                elif packets := self.read():
                    self._ledger.keep(packets)
                else:
                    self.wait()
            self._stop = False
        finally:
            try:
                self._end(run)
            finally:
                # A signal handler may raise where the call begins, too: then nothing of it was done.
                self._end(run)

    def __aiter__(self) -> AsyncIterator[Packet]:
        """The same in an event loop of asyncio, which is not blocked while no packet waits."""
        return _Awaited(self)

    def _next_held(self) -> Packet:
        with self._lock:
            return self._ledger.hold(time.monotonic())

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
                raise QueueStateError(self.number, "it is already running")
            self._runner = threading.get_ident()
            self._run = run
        # Left by a run that a signal's exception ended.
        self._send_undecided()

    def _end(self, run: object) -> None:
        # Also if a signal handler raised between two steps of a run.
        if self._run is run:
            self._ledger.end_run()
            self._runner = None
            self._run = None
            with self._lock:
                pass
            # A request that another thread made just before.
            self._work()

    def _stopped(self) -> bool:
        if self._jobs:
            self._work()
        if self._ledger.holds:
            self._answer_late()
        return self._stop

    def stop(self) -> None:
        """End `run` or the iteration after its turn, from any thread or signal handler. Called before, it ends the next one."""
        self._stop = True
        self._notify()


class _Awaited:
    """An asynchronous iteration. Not a generator: after a `break` that ends only when the event loop finalizes it."""

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
                if queue._ledger.read_ahead:
                    return queue._next_held()
                if packets := queue.read():
                    queue._ledger.keep(packets)
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
            try:
                self._queue._end(run)
            finally:
                self._queue._end(run)

    __del__ = _end
