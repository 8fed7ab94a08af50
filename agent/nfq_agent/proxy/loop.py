"""The transparent TCP proxy: accept, find out where the connection was going, connect there, and let the bytes run.

One epoll loop in each process for all connections. It never dials itself, never waits for a name or a peer, and writes no rule.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import os
import resource
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from nfq_agent.config.models import Config, ProxyConfig, target_in_force
from nfq_agent.counters import Slots
from nfq_agent.element import Emit
from nfq_agent.host.child import DRAIN, READY, STOP
from nfq_agent.host.sockets import (
    Address,
    bind_as,
    is_local,
    original_destination,
    reset_on_close,
    set_mark,
    set_transparent,
    unmapped,
)
from nfq_agent.proxy.processes import Sibling
from nfq_agent.proxy.relay import EVENTS, READ, Half, Pair, failure
from nfq_agent.rate import Bucket, Held
from nfq_agent.stream import Close, Connection, Failed, Output, Stream, StreamChain, endpoint
from nfq_agent.values import Endpoint

_BACKLOG: Final = 4096
# Connections taken in one turn before those that run get theirs.
_ACCEPTS: Final = 64
_POLLED: Final = 512
# Descriptors that are not for connections.
_SPARE: Final = 64
# How long to wait before accepting again when the system is out of something.
_PAUSE: Final = 0.2
# How long the start waits for the target's name to be resolved, and after how long that is tried again.
_RESOLVE: Final = 3.0
_RESOLVE_AGAIN: Final = 5.0
# How long the start waits for the other processes, how long they may take to end after this one, and how often their
# counts are added up.
_READY: Final = 8.0
_TOGETHER: Final = 1.0
_ADD_UP: Final = 0.5
_UNDER_WAY: Final = (0, errno.EINPROGRESS)
_SHORT_OF: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
# Warnings about single connections, a second: a flood of them must not become a flood of lines.
_WARNINGS: Final = 20.0

# The slots of a proxy's counters.
COUNTERS: Final = ("connections", "active", "refused", "failed_upstream", "reset", "element_errors", "bytes_forward",
                   "bytes_reverse")  # fmt: skip


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """What a proxy's process needs to know. Times in seconds, sizes in bytes.

    target: where connections go whose destination is not known. own_listeners: every listener of the agent. own_ports: their
    ports. keep_client: speak to the destination with the client's address (capture by TPROXY only). mark: of the packets
    that go there.
    """

    name: str
    target: tuple[str, int] | None = None
    chunk: int = 4096
    on_error: Literal["pass", "drop"] = "pass"
    connect_timeout: float = 10.0
    drain: float = 10.0
    own_listeners: tuple[tuple[str, int], ...] = ()
    capture: Literal["redirect", "tproxy"] = "redirect"
    keep_client: bool = False
    mark: int | None = None
    buffer: int = 256 * 1024
    max_connections: int = 10_000
    processes: int = 1

    @classmethod
    def of(cls, name: str, config: Config) -> ProxySettings:
        """The settings of `[proxy.NAME]`; TARGET_ADDR in the environment wins over its `target`. Raises ConfigError."""
        proxy = config.proxy[name]
        target = target_in_force(proxy)
        return cls(
            name=name,
            target=None if target is None else (target.host, target.port),
            chunk=proxy.chunk,
            on_error=proxy.on_error,
            connect_timeout=proxy.connect_timeout,
            drain=proxy.drain,
            own_listeners=tuple((e.host, e.port) for each in config.proxy.values() for e in each.listen),
            capture=proxy.capture,
            keep_client=proxy.keep_client,
            mark=None if proxy.mark is None else proxy.mark.value,
            buffer=proxy.buffer,
            max_connections=proxy.max_connections,
            processes=proxy.processes,
        )


def listen(config: ProxyConfig, before: ProxyConfig | None = None, there: Sequence[socket.socket] = ()) -> list[socket.socket]:
    """Bound and listening sockets for a proxy, in the configuration's order. Raises OSError that names the address.

    A `[::]` listener takes IPv4 too, unless a listener of IPv4 has the same port. Processes may share them. before, there: a
    configuration and what listens by it; those of them that fit are used again.
    """
    kept = {} if before is None else dict(zip(_places(before), there, strict=True))
    transparent = config.capture == "tproxy"
    listeners = []
    with contextlib.ExitStack() as undo:
        for at, v6only in _places(config):
            sock = kept.get((at, v6only))
            if sock is None:
                sock = undo.enter_context(_listen(at, transparent, v6only))
            elif transparent:
                set_transparent(sock)
            listeners.append(sock)
        undo.pop_all()
    return listeners


def _places(config: ProxyConfig) -> list[tuple[Endpoint, bool]]:
    taken = {each.port for each in config.listen if ":" not in each.host}
    return [(each, each.port in taken) for each in config.listen]


def _listen(at: Endpoint, transparent: bool, v6only: bool) -> socket.socket:
    sock: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            at.host, at.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
        if transparent:
            set_transparent(sock)
        _tune(sock)
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise OSError(error.errno, f"can't listen on {at}: {error.strerror}") from error
    return sock


def _tune(sock: socket.socket) -> None:
    """No delay for small segments, and probes for a peer that is gone. Accepted sockets inherit both (tcp(7))."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def serve(
    listeners: list[socket.socket],
    chain_of: Callable[[], StreamChain],
    settings: ProxySettings,
    counters: Slots,
    control: socket.socket,
    emit: Emit,
) -> None:
    """Run a proxy until it is told to end. It says `ready` on `control` when it accepts.

    `drain` there: take nothing new, let go of the listeners, let what runs end for `settings.drain` seconds, then reset the
    rest, and return. `stop`, or the end of `control`: reset everything and return.
    """
    siblings: list[Sibling] = []

    def alone(control: socket.socket, counters: Slots) -> None:
        chain = chain_of()
        chain.start()
        proxy = Proxy(listeners, chain, settings, counters, control, emit, siblings)
        try:
            proxy.run()
        finally:
            proxy.close()
            chain.stop()

    def sibling(control: socket.socket, counters: Slots) -> None:
        siblings.clear()
        alone(control, counters)

    try:
        for _ in range(settings.processes - 1):
            siblings.append(Sibling(sibling, COUNTERS, [control, *(each.control for each in siblings)]))
        for each in siblings:
            each.wait_ready(_READY)
        alone(control, counters)
    except BaseException:
        for each in siblings:
            each.tell(STOP)
        raise
    finally:
        # They were told what we were told, and have the same time for it.
        deadline = time.monotonic() + _TOGETHER
        for each in siblings:
            each.end(deadline)


class Proxy:
    """All connections of one process."""

    def __init__(
        self,
        listeners: list[socket.socket],
        chain: StreamChain,
        settings: ProxySettings,
        counters: Slots,
        control: socket.socket,
        emit: Emit,
        siblings: Sequence[Sibling] = (),
    ) -> None:
        self._siblings = {each.control.fileno(): each for each in siblings}
        self._chain = chain
        self._settings = settings
        self._counters = counters
        self._control = control
        self._emit = emit
        self._epoll = select.epoll()
        self._buffer = memoryview(bytearray(READ))
        self._halves: dict[int, Half] = {}
        self._pairs: set[Pair] = set()
        self._listeners = {listener.fileno(): listener for listener in listeners}
        self._accepting = False
        ports = [port for _, port in settings.own_listeners] + [each.getsockname()[1] for each in listeners]
        self._own_ports = frozenset(ports)
        self._target: list[tuple[int, Address]] = []
        # In the order of their deadlines, since all have the same time.
        self._connecting: dict[Pair, tuple[float, list[tuple[int, Address]]]] = {}
        self._timers: list[tuple[float, int, Pair]] = []
        self._timer = 0
        self._again: dict[Half, None] = {}
        self._resume: float | None = None
        self._failed_dials: list[tuple[Pair, list[tuple[int, Address]], str]] = []
        self._draining = False
        self._deadline: float | None = None
        self._stopped = False
        # Unique on this host: a process number is used again, so a random part is in front.
        self._prefix = os.urandom(4).hex()
        self._serial = 0
        # Counting goes on where a process before this one ended.
        self._counted = {**counters.snapshot(), "active": 0}
        self._bytes = [self._counted["bytes_forward"], self._counted["bytes_reverse"]]
        self._written: dict[str, int] = {}
        self._several = bool(siblings)
        # What siblings that have ended had counted.
        self._ended: dict[str, int] = {}
        self._warnings = Bucket(_WARNINGS, _WARNINGS, 0.0)
        self._held = Held()
        self._now = time.monotonic()
        self._limit = settings.max_connections

    def run(self) -> None:
        """Serve until told to end."""
        self._raise_limit()
        if self._settings.target is not None:
            settled = threading.Event()
            threading.Thread(target=self._resolve, args=(settled,), daemon=True).start()
            settled.wait(_RESOLVE)
        self._control.setblocking(False)
        self._epoll.register(self._control, select.EPOLLIN)
        for descriptor in self._siblings:
            self._epoll.register(descriptor, select.EPOLLIN)
        self._accept_on()
        self._control.send(READY, socket.MSG_NOSIGNAL)
        control = self._control.fileno()
        poll, halves = self._epoll.poll, self._halves
        while not self._stopped:
            events = poll(self._patience(), _POLLED)
            self._now = now = time.monotonic()
            ready: list[socket.socket] = []
            for descriptor, mask in events:
                half = halves.get(descriptor)
                if half is not None:
                    self._event(half, mask)
                elif descriptor == control:
                    self._told()
                elif (listener := self._listeners.get(descriptor)) is not None:
                    ready.append(listener)
                elif (sibling := self._siblings.get(descriptor)) is not None:
                    self._gone(sibling)
            if self._again:
                halves_again, self._again = self._again, {}
                for half in halves_again:
                    if half.pair.over is None and half.pair.pump(half, self._buffer, now):
                        self._again[half] = None
                    self._settle(half.pair)
            self._time(now)
            # Last, so that a descriptor that was closed in this turn is not met again under another owner.
            if self._failed_dials:
                self._dial_again()
            for listener in ready:
                self._accept(listener)
            if self._draining and self._deadline is None:
                self._drain()
            self._count()

    def close(self) -> None:
        """Reset what still runs, and let go of everything but the listeners."""
        for pair in list(self._pairs):
            if pair.over is None:
                pair.over = "the proxy ended"
            self._settle(pair)
        self._count()
        self._epoll.close()

    def _raise_limit(self) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
                soft = hard
        possible = (soft - _SPARE) // 2
        if possible < self._limit:
            self._limit = max(1, possible)
            self._emit(
                f"proxy {self._settings.name}: {soft} descriptors are enough for {self._limit} connections, not for "
                f"{self._settings.max_connections}; raise LimitNOFILE= or lower max_connections",
                level="warning",
            )

    def _resolve(self, settled: threading.Event, again: bool = False) -> None:
        """Find the target's addresses; runs beside the loop, since a resolver may take its time. Tries until it has some."""
        assert self._settings.target is not None
        host, port = self._settings.target
        where = f"proxy {self._settings.name}: target {endpoint((host, port))}"
        while True:
            try:
                found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                break
            except OSError as error:
                if not again:
                    self._emit(
                        f"{where} can't be resolved: {error.strerror}; connections that need it are refused until it can be",
                        level="error",
                    )
                again = True
                settled.set()
                time.sleep(_RESOLVE_AGAIN)
        addresses: list[tuple[int, Address]] = [
            (family, address) for family, _, _, _, address in found if not self._is_own(address)
        ]
        if not addresses:
            self._emit(f"{where} is a listener of our own; not used", level="error")
        elif again:
            self._emit(f"{where} is resolved: {', '.join(endpoint(address[:2]) for _, address in addresses)}")
        self._target = addresses
        settled.set()

    def _is_own(self, address: Address) -> bool:
        return address[1] in self._own_ports and is_local(address[0])

    # Accepting

    def _accept_on(self) -> None:
        if not self._accepting:
            for descriptor in self._listeners:
                # One process of several wakes, not all.
                self._epoll.register(descriptor, select.EPOLLIN | select.EPOLLEXCLUSIVE)
            self._accepting = True

    def _accept_off(self) -> None:
        if self._accepting:
            for descriptor in self._listeners:
                self._epoll.unregister(descriptor)
            self._accepting = False

    def _accept(self, listener: socket.socket) -> bool:
        """Take who waits. False once nobody does, or nobody can be taken."""
        for _ in range(_ACCEPTS):
            if len(self._pairs) >= self._limit:
                # The rest waits in the kernel's backlog.
                self._accept_off()
                return False
            try:
                client, address = listener.accept()
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno in _SHORT_OF:
                    self._warn(f"proxy {self._settings.name}: can't accept: {error.strerror}; trying again")
                    self._accept_off()
                    self._resume = self._now + _PAUSE
                    return False
                # The connection was gone before it was taken (accept(2)).
                continue
            try:
                self._take(client, address)
            except OSError as error:
                self._refuse(client, address, f"{error.strerror}")
        return True

    def _take(self, client: socket.socket, address: Address) -> None:
        """A new connection: find out where it was going, and connect there. Raises OSError."""
        destination: Address | None
        if self._settings.capture == "tproxy":
            destination = unmapped(client.getsockname())
        else:
            destination = original_destination(client, address)
        peer = unmapped(address)
        own = destination is not None and self._is_own(destination)
        if destination is None or own:
            if not self._target:
                why = "it was sent to our own listener" if own else "its original destination is not known"
                self._refuse(client, address, f"{why}, and no target is configured")
                return
            candidates = list(self._target)
        else:
            candidates = [(socket.AF_INET6 if len(destination) > 2 else socket.AF_INET, destination)]
        connection = Connection(
            self._identity(), peer[:2], None if destination is None else destination[:2],
            candidates[0][1][:2], self._now, self._now,
        )  # fmt: skip
        stream = Stream(connection, self._chain, self._settings.chunk, self._settings.on_error) if len(self._chain) else None
        self._counted["connections"] += 1
        if stream is not None:
            outputs = stream.opened()
            self._failures(connection, [each for each in outputs if isinstance(each, Failed)])
            if any(isinstance(each, Close) for each in outputs):
                self._counted["refused"] += 1
                self._failures(connection, stream.finished(self._now))
                _reset(client)
                return
        self._dial(client, connection, stream, candidates)

    def _identity(self) -> str:
        self._serial += 1
        return f"{self._prefix}-{self._serial:x}"

    def _refuse(self, client: socket.socket, address: Address, why: str) -> None:
        self._counted["refused"] += 1
        peer, identity = endpoint(unmapped(address)[:2]), self._identity()
        self._warn(
            f"proxy {self._settings.name}: connection {identity}: refused, from {peer}: {why}", connection=identity, src=peer
        )
        _reset(client)

    def _dial(
        self,
        client: socket.socket,
        connection: Connection,
        stream: Stream | None,
        candidates: list[tuple[int, Address]],
        reason: str = "no address",
    ) -> None:
        """Begin to connect to the first candidate that does not fail at once. reason: why those before it failed."""
        while candidates:
            family, address = candidates.pop(0)
            connection.upstream = address[:2]
            upstream: socket.socket | None = None
            try:
                upstream = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                _tune(upstream)
                if self._settings.mark is not None:
                    set_mark(upstream, self._settings.mark)
                if self._settings.keep_client and (":" in connection.client[0]) == (family == socket.AF_INET6):
                    bind_as(upstream, connection.client)
                # Not connect(): an exception for what happens each time costs as much as the rest of this.
                if (refused := upstream.connect_ex(address)) not in _UNDER_WAY:
                    raise OSError(refused, os.strerror(refused))
            except OSError as error:
                if upstream is not None:
                    upstream.close()
                reason = error.strerror or str(error)
                continue
            pair = Pair(connection, client, upstream, stream, self._bytes, self._settings.buffer)
            self._pairs.add(pair)
            self._connecting[pair] = (self._now + self._settings.connect_timeout, candidates)
            for half in (pair.client, pair.upstream):
                self._halves[half.sock.fileno()] = half
                self._epoll.register(half.sock, EVENTS)
            return
        self._failed(connection, stream, reason)
        _reset(client)

    def _failed(self, connection: Connection, stream: Stream | None, reason: str) -> None:
        self._counted["failed_upstream"] += 1
        to = endpoint(connection.upstream)
        self._warn(
            f"proxy {self._settings.name}: connection {connection.id}: can't connect {endpoint(connection.client)} to {to}: "
            f"{reason}",
            **connection.fields,
        )
        if stream is not None:
            self._failures(connection, stream.finished(self._now, f"can't connect to {to}: {reason}"))

    # Running

    def _event(self, half: Half, mask: int) -> None:
        pair = half.pair
        if not pair.connected and half is pair.upstream:
            if mask & (select.EPOLLERR | select.EPOLLHUP):
                self._unreachable(pair, failure(half.sock) or "connection closed")
                return
            if not mask & select.EPOLLOUT:
                return
            pair.connected = True
            del self._connecting[pair]
            if pair.client.readable and pair.pump(pair.client, self._buffer, self._now):
                self._again[pair.client] = None
        if pair.turn(half, mask, self._buffer, self._now):
            for each in (pair.client, pair.upstream):
                if each.readable:
                    self._again[each] = None
        if not pair.connected and mask & (select.EPOLLERR | select.EPOLLHUP):
            pair.over = "the client went away"
        if pair.over is not None or pair.stream is not None:
            self._settle(pair)

    def _settle(self, pair: Pair) -> None:
        """After a pair was touched: say what failed, set its timer, and close it if it is over."""
        if pair.failures:
            self._failures(pair.connection, pair.failures)
            pair.failures.clear()
        if pair.over is None:
            if pair.stream is not None:
                due = pair.stream.due
                if due is not None and (pair.timed is None or due < pair.timed):
                    pair.timed = due
                    self._timer += 1
                    heapq.heappush(self._timers, (due, self._timer, pair))
            return
        if pair not in self._pairs:
            return
        self._forget(pair)
        if pair.over:
            self._counted["reset"] += 1
        if pair.stream is not None:
            self._failures(pair.connection, pair.stream.finished(self._now, pair.over))
            # A timer far ahead must not keep what is closed.
            if len(self._timers) > 64 + 2 * len(self._pairs):
                self._timers = [timer for timer in self._timers if timer[2].over is None]
                heapq.heapify(self._timers)
        pair.close()
        self._room()

    def _forget(self, pair: Pair) -> None:
        self._pairs.discard(pair)
        self._connecting.pop(pair, None)
        for half in (pair.client, pair.upstream):
            self._halves.pop(half.sock.fileno(), None)
            self._again.pop(half, None)

    def _unreachable(self, pair: Pair, reason: str) -> None:
        """Connecting failed: at the end of this turn, the next address or the end."""
        _, candidates = self._connecting[pair]
        self._forget(pair)
        self._epoll.unregister(pair.client.sock)
        pair.upstream.sock.close()
        self._failed_dials.append((pair, candidates, reason))

    def _dial_again(self) -> None:
        failed, self._failed_dials = self._failed_dials, []
        for pair, candidates, reason in failed:
            self._dial(pair.client.sock, pair.connection, pair.stream, candidates, reason)
        self._room()

    def _room(self) -> None:
        if not self._accepting and not self._draining and self._resume is None and len(self._pairs) < self._limit:
            self._accept_on()

    def _failures(self, connection: Connection, outputs: list[Output] | list[Failed]) -> None:
        for each in outputs:
            if isinstance(each, Failed):
                self._counted["element_errors"] += 1
                kind = type(each.error).__name__
                self._warn(
                    f"connection {connection.id}: element {each.element} raised {kind}: {each.error}; "
                    f"on_error = {self._settings.on_error}",
                    level="error", element=each.element, **connection.fields,
                )  # fmt: skip

    def _warn(self, message: str, level: str = "warning", **fields: Any) -> None:
        if not self._warnings.take(self._now):
            self._held.add(self._now)
        else:
            self._emit(message, level=level, **fields)
        if count := self._held.due(self._now):
            self._emit(f"proxy {self._settings.name}: {count} more warnings were held back", level="warning", held=count)

    # Time and control

    def _patience(self) -> float:
        """Seconds until something is due; -1 for ever."""
        if self._again:
            return 0.0
        due: list[float] = []
        if self._connecting:
            due.append(next(iter(self._connecting.values()))[0])
        if self._timers:
            due.append(self._timers[0][0])
        if self._resume is not None:
            due.append(self._resume)
        if self._deadline is not None:
            due.append(self._deadline)
        if self._siblings:
            due.append(self._now + _ADD_UP)
        # A millisecond more than the difference: epoll_wait(2) counts in those, and must not wake too early.
        return max(0.0, min(due) - time.monotonic()) + 0.001 if due else -1

    def _time(self, now: float) -> None:
        while self._connecting:
            pair, (deadline, _) = next(iter(self._connecting.items()))
            if deadline > now:
                break
            self._unreachable(pair, f"no answer within {self._settings.connect_timeout:g} s")
        while self._timers and self._timers[0][0] <= now:
            _, _, pair = heapq.heappop(self._timers)
            pair.timed = None
            if pair.over is None and pair.connected and pair.woken(self._buffer, now):
                for half in (pair.client, pair.upstream):
                    if half.readable:
                        self._again[half] = None
            self._settle(pair)
        if self._resume is not None and self._resume <= now:
            self._resume = None
            self._room()
        if self._deadline is not None and (self._deadline <= now or not (self._pairs or self._siblings)):
            self._stopped = True

    def _told(self) -> None:
        try:
            words = self._control.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            words = b""
        for sibling in self._siblings.values():
            sibling.tell(words or STOP)
        if not words or STOP in words:
            self._stopped = True
        elif DRAIN in words:
            self._draining = True

    def _gone(self, sibling: Sibling) -> None:
        """A process beside this one has ended. Raises ChildProcessError if it should not have."""
        descriptor = sibling.control.fileno()
        self._epoll.unregister(descriptor)
        if not self._draining:
            raise ChildProcessError(f"process {sibling.pid} of proxy {self._settings.name} ended")
        for name, value in sibling.counters.snapshot().items():
            self._ended[name] = self._ended.get(name, 0) + value
        del self._siblings[descriptor]

    def _drain(self) -> None:
        # Who was redirected already waits in the backlog: they are taken, and nobody after them.
        for listener in self._listeners.values():
            while self._accept(listener):
                pass
        self._accept_off()
        # Whoever made them may let go of the ports from now on.
        for listener in self._listeners.values():
            listener.close()
        self._listeners.clear()
        self._deadline = self._now + self._settings.drain
        self._stopped = not self._pairs and not self._siblings

    def _count(self) -> None:
        counted = self._counted
        counted["active"] = len(self._pairs)
        counted["bytes_forward"], counted["bytes_reverse"] = self._bytes
        written = self._written
        others = [sibling.counters.snapshot() for sibling in self._siblings.values()]
        for name, value in counted.items():
            if self._several:
                value += self._ended.get(name, 0) + sum(other[name] for other in others)
            if written.get(name) != value:
                written[name] = value
                self._counters.set(name, value)


def _reset(client: socket.socket) -> None:
    with contextlib.suppress(OSError):
        reset_on_close(client)
    client.close()
