"""The transparent TCP proxy: accept, find out where the connection was going, connect there, and move the bytes.

One epoll loop in each process for all connections. It never connects to itself, never waits for a name or a peer, and writes
no rule. The decisions are made elsewhere, without I/O: where to connect by `dialer`, what happens to bytes by `stream`.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterable, Sequence
from typing import Final

from nfq_agent.counters import Slots
from nfq_agent.element import Emit
from nfq_agent.host.child import DRAIN, READY, STOP
from nfq_agent.host.own_process import OwnProcess
from nfq_agent.host.sockets import Address, keep_alive, reset, unmapped
from nfq_agent.proxy.arrivals import Arrivals
from nfq_agent.proxy.attempts import Attempts
from nfq_agent.proxy.deadlines import Expired
from nfq_agent.proxy.dialer import Refused
from nfq_agent.proxy.ending import Ending
from nfq_agent.proxy.lines import Lines
from nfq_agent.proxy.listeners import Listeners, Outcome
from nfq_agent.proxy.needs import needs_of
from nfq_agent.proxy.pairs import AnyPair, Pairs, upstream_of
from nfq_agent.proxy.plain_pairs import PlainPair, PlainPairs
from nfq_agent.proxy.processes import Sibling
from nfq_agent.proxy.relay import READ, Half, Pair, failure
from nfq_agent.proxy.settings import ProxySettings
from nfq_agent.proxy.tally import Tally
from nfq_agent.proxy.target import TargetResolver
from nfq_agent.proxy.timers import Timers
from nfq_agent.stream import Close, Connection, Failed, Output, StreamChain

# How often, in seconds, this process shows that it makes progress.
_BEAT: Final = 0.5
# How often, in seconds, the counts of the other processes are added up.
_ADD_UP: Final = 0.5
# How often, in seconds, a full proxy looks for idle connections to end.
_MAKE_ROOM: Final = 1.0
_HUNG_UP: Final = select.EPOLLERR | select.EPOLLHUP


class Proxy:
    """All connections of one process."""

    def __init__(  # noqa: PLR0913  # what a process is given
        self,
        listeners: list[socket.socket],
        chain: StreamChain,
        settings: ProxySettings,
        counters: Slots,
        control: socket.socket,
        emit: Emit,
        siblings: Sequence[Sibling] = (),
        process: OwnProcess = OwnProcess(),  # noqa: B008  # frozen
        *,
        compiled: bool = True,
    ) -> None:
        """compiled: whether pairs without a stream are carried by plain_pairs.pyx, else by relay.py."""
        self._process = process
        self._next_beat = 0.0
        self._siblings = {each.control.fileno(): each for each in siblings}
        self._settings = settings
        self._control = control
        self._emit = emit
        self._epoll = select.epoll()
        self._plain = PlainPairs(self._epoll.fileno(), self)
        self._listeners = Listeners(listeners, self._epoll, settings.max_connections, self._plain.accept if compiled else None)
        self._arrivals = Arrivals(chain, settings, listeners)
        self._straight = compiled and self._arrivals.go_straight(self._plain)
        self._dialer = self._arrivals.dialer
        self._pairs = Pairs(settings, self._arrivals.sources, self._epoll)
        self._deadlines = self._pairs.deadlines
        self._make_room: float | None = None
        self._buffer = memoryview(bytearray(READ))
        self._timers = Timers()
        self._ending = Ending(settings.drain)
        self._tally = Tally(counters, bool(siblings))
        self._lines = Lines(settings.name, emit)
        self._attempts = Attempts(
            settings, self._arrivals, self._pairs, self._plain if compiled else None, self._epoll, self._tally, self._lines,
            self._failures,
        )  # fmt: skip
        self._plain.share(
            self._pairs.by_key, self._deadlines.new, self._deadlines.first, self._dialer.attempts, self._dialer.timeout
        )
        self._write_counts()
        self._plain.count_in(*self._tally.carried_in)
        self._now = time.monotonic()

    def run(self) -> None:
        """Serve until told to end."""
        self._begin()
        control = self._control.fileno()
        wait, halves = self._plain.wait, self._pairs.halves
        while not self._ending.over:
            events = wait(self._patience())
            self._now = now = time.monotonic()
            if now >= self._next_beat:
                self._next_beat = now + _BEAT
                self._process.beat()
            ready: list[socket.socket] = []
            for descriptor, mask in events:
                half = halves.get(descriptor)
                if half is not None:
                    self._event(half, mask)
                elif descriptor == control:
                    self._on_control()
                elif (listener := self._listeners.get(descriptor)) is not None:
                    ready.append(listener)
                elif (sibling := self._siblings.get(descriptor)) is not None:
                    self._on_sibling_end(sibling)
            if self._pairs.again:
                self._move_more(now)
            self._on_time(now)
            # Last, so that a descriptor that was closed in this turn does not come up again under another owner.
            self._attempts.again(self._now)
            self._accept_if_room()
            for listener in ready:
                self._accept(listener)
            if self._ending.begins:
                self._drain()
            self._write_counts()

    def _begin(self) -> None:
        if (few := self._listeners.fit_descriptors()) is not None:
            self._lines.few_descriptors(few, self._listeners.limit, self._settings.max_connections)
        if self._straight:
            self._plain.listen(self._listeners.descriptors, self._listeners.limit)
        self._process.shut(needs_of(self._settings, self._arrivals.questions, bool(self._siblings)))
        if self._settings.target is not None:
            TargetResolver(self._settings.name, self._settings.target, self._dialer.aim_at, self._emit).start()
        self._control.setblocking(False)
        self._epoll.register(self._control, select.EPOLLIN)
        for descriptor in self._siblings:
            self._epoll.register(descriptor, select.EPOLLIN)
        self._accept_if_room()
        self._control.send(READY, socket.MSG_NOSIGNAL)

    def close(self) -> None:
        """Reset what still runs, and close everything but the listeners."""
        for pair in list(self._pairs.by_key.values()):
            if pair.over is None:
                pair.over = "the proxy ended"
            self._end(pair)
        self._write_counts()
        self._arrivals.close()
        self._plain.close()
        self._epoll.close()

    def _write_counts(self) -> None:
        *carried, begun = self._plain.take_counts()
        for way, count in enumerate(carried):
            self._tally.bytes[way] += count
        self._tally.counted["connections"] += begun
        self._tally.write(len(self._pairs), list(self._siblings.values()))

    # Accepting

    def _accept(self, listener: socket.socket) -> None:
        outcome = self._listeners.accept(listener, self._active, self._take, self._now)
        if outcome is Outcome.SHORT:
            self._lines.warn(f"proxy {self._settings.name}: cannot accept: {self._listeners.shortage}; trying again", self._now)
        elif outcome is Outcome.FULL:
            self._tally.add("full")
            self._lines.full(len(self._pairs), self._listeners.waiting, self._now)
            self._make_room = self._now + _MAKE_ROOM

    def _active(self) -> int:
        return len(self._pairs)

    def _accept_if_room(self) -> None:
        """A connection has ended, or a pause: accept again if there is room."""
        if not (self._listeners.accepting or self._ending.draining):
            self._listeners.resume(len(self._pairs), self._now)

    def _take(self, client: socket.socket, address: Address, due: bool = False) -> None:
        """A new connection: refuse it, or connect to where it was going."""
        try:
            why = self._open(client, address, due)
        except OSError as error:
            why = f"{error.strerror}"
        if why is not None:
            self._tally.add("refused")
            self._lines.refused(self._arrivals.identity(), unmapped(address)[:2], why, self._now)
            reset(client)

    def _open(self, client: socket.socket, address: Address, due: bool) -> str | None:
        """Begin to connect a new connection; why it is refused, if it is. Raises OSError."""
        arrival = self._arrivals.look_at(client, address, self._now, due)
        if isinstance(arrival, Refused):
            return arrival.why
        connection, route, stream = arrival
        self._tally.add("connections")
        if stream is not None:
            outputs = stream.opened()
            self._failures(connection, outputs)
            if any(isinstance(each, Close) for each in outputs):
                self._tally.add("refused")
                self._failures(connection, stream.finished(self._now))
                reset(client)
                return None
        self._attempts.run(self._dialer.start(connection, route, self._now), client, connection, stream, self._now)
        return None

    # What plain pairs leave to this loop (class Owner in plain_pairs.pyi)

    def take(self, client: int, family: int, address: Address, due: bool, now: float) -> None:
        """A new connection whose destination needs a decision. due: it is to be checked for a loop."""
        self._now = now
        self._take(socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, client), address, due)

    def failed(self, pair: PlainPair, number: int, now: float) -> None:
        """A new connection cannot be connected, by this error."""
        self._tally.add("connections")
        self._attempts.fail(pair, number, now)

    def unreachable(self, pair: PlainPair, reason: str) -> None:
        """An attempt to connect has failed."""
        self._attempts.unreachable(pair, reason)

    def ended(self, pair: PlainPair, now: float) -> None:
        """A pair is over."""
        self._now = now
        self._end(pair)

    # Running

    def _event(self, half: Half, mask: int) -> None:
        pair = half.pair
        if not pair.connected and half is pair.upstream:
            if mask & _HUNG_UP:
                self._attempts.unreachable(pair, failure(half.sock) or "connection closed")
                return
            if not mask & select.EPOLLOUT:
                return
            pair.connected = True
            self._dialer.connected(pair.connection)
            if pair.client.readable and pair.pump(pair.client, self._buffer, self._now):
                self._pairs.again[pair.client] = None
        if pair.turn(half, mask, self._buffer, self._now):
            self._queue_again(pair)
        if not pair.connected and mask & _HUNG_UP:
            pair.over = "the client closed the connection"
        if pair.over is not None or pair.stream is not None:
            self._update(pair)

    def _queue_again(self, pair: Pair) -> None:
        for half in (pair.client, pair.upstream):
            if half.readable:
                self._pairs.again[half] = None

    def _move_more(self, now: float) -> None:
        again, self._pairs.again = self._pairs.again, {}
        for half in again:
            if half.pair.over is None and half.pair.pump(half, self._buffer, now):
                self._pairs.again[half] = None
            self._update(half.pair)

    def _update(self, pair: Pair) -> None:
        """After a turn of a pair: log what failed, set its timer, and close it if it has ended."""
        if pair.failures:
            self._failures(pair.connection, pair.failures)
            pair.failures.clear()
        if pair.over is None:
            self._timers.set(pair)
            return
        self._end(pair)

    def _end(self, pair: AnyPair) -> None:
        if not self._pairs.forget(pair):
            return
        if not pair.connected:
            self._dialer.gone(pair.key)
        if pair.over:
            self._tally.add("reset")
        if isinstance(pair, Pair) and pair.stream is not None:
            self._failures(pair.connection, pair.stream.finished(self._now, pair.over or ""))
            self._timers.prune(len(self._pairs))
        pair.close()
        self._accept_if_room()

    def _failures(self, connection: Connection, outputs: Iterable[Output]) -> None:
        for each in outputs:
            if isinstance(each, Failed):
                self._tally.add("element_errors")
                self._lines.element_failed(connection, each, self._settings.on_error, self._now)

    # Time and control

    def _patience(self) -> float:
        """Seconds until something is due: the next beat at the latest."""
        if self._pairs.again:
            return 0.0
        due = [self._next_beat]
        due += [
            each
            for each in (
                self._dialer.due,
                self._listeners.due,
                self._timers.due,
                self._deadlines.due,
                self._ending.due,
                self._make_room,
            )
            if each is not None
        ]
        if self._siblings:
            due.append(self._now + _ADD_UP)
        # A millisecond more than the difference: epoll_wait(2) counts in those, and must not wake too early.
        return max(0.0, min(due) - time.monotonic()) + 0.001

    def _on_time(self, now: float) -> None:
        for late in self._dialer.woken(now):
            if (pair := self._pairs.by_key.get(late.key)) is not None:
                self._attempts.unreachable(pair, late.reason)
        for pair in self._timers.woken(now):
            if pair.over is None and pair.connected and pair.woken(self._buffer, now):
                self._queue_again(pair)
            self._update(pair)
        if self._listeners.due is not None and self._listeners.due <= now:
            self._accept_if_room()
        self._end_silent(now)
        self._ending.look(now, self._empty)

    def _end_silent(self, now: float) -> None:
        """End connections that have been silent for too long; while the proxy is full, also those that have been idle for a
        shorter time."""
        lasting, expired = self._deadlines.woken(now)
        for pair in lasting:
            # Not for each connection: most are over by now, and this takes several system calls.
            if pair.connected and self._settings.keepalive:
                with upstream_of(pair) as sock:
                    keep_alive(sock, self._settings.keepalive)
        if self._make_room is not None and self._make_room <= now:
            full = len(self._pairs) >= self._listeners.limit
            self._make_room = now + _MAKE_ROOM if full else None
            if full and self._listeners.waiting:
                expired += self._deadlines.crowded(now)
        for each in expired:
            self._expire(each)

    def _expire(self, expired: Expired[AnyPair]) -> None:
        pair = expired.key
        if pair.over is None:
            self._tally.add("timed_out")
            pair.over = expired.reason
            connection = pair.connection if isinstance(pair, Pair) else self._arrivals.connection_of(pair)
            self._lines.timed_out(connection, expired.reason, self._now)
            self._end(pair)

    def _on_control(self) -> None:
        try:
            words = self._control.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            words = b""
        if not words:
            words = DRAIN if self._settings.lingers else STOP
            self._epoll.unregister(self._control)
        for sibling in self._siblings.values():
            sibling.tell(words)
        self._ending.on_control(words, self._now)

    def _on_sibling_end(self, sibling: Sibling) -> None:
        """A process beside this one has ended. Raises ChildProcessError if it should not have."""
        descriptor = sibling.control.fileno()
        self._epoll.unregister(descriptor)
        if not self._ending.draining:
            raise ChildProcessError(f"process {sibling.pid} of proxy {self._settings.name} ended")
        self._tally.sibling_ended(sibling)
        del self._siblings[descriptor]

    def _drain(self) -> None:
        # Connections that were redirected already wait in the backlog: they are accepted, later ones are not.
        self._listeners.drain(self._active, self._take, self._now)
        self._ending.begun(self._now, self._empty)

    @property
    def _empty(self) -> bool:
        return not self._pairs and not self._siblings
