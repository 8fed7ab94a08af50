"""The listening sockets of a proxy: opened for a configuration, and accepted from while there is room.

It accepts connections and does nothing else with them. Further ones wait in the kernel's backlog.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import socket
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Final

from nfq_agent.config.proxy import ProxyConfig
from nfq_agent.host.families import families
from nfq_agent.host.sockets import Address, backlog_of, keep_alive, no_delay, set_transparent
from nfq_agent.values import Endpoint

_BACKLOG: Final = 4096
# Descriptors that are not for connections.
_SPARE: Final = 64
# Connections that one listener accepts in one turn, before the other listeners get theirs.
ACCEPTS: Final = 64
# How long to wait before accepting again when the system is out of descriptors or memory.
PAUSE: Final = 0.2
# Where to listen, and whether to leave IPv4 to another listener there.
ListenAt = tuple[Endpoint, bool]
_SHORT_OF: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))


def listen(config: ProxyConfig, existing: Mapping[ListenAt, socket.socket] | None = None) -> list[socket.socket]:
    """Bound and listening sockets for a proxy, in the configuration's order. Raises OSError that names the address.

    A `[::]` listener takes IPv4 too, unless a listener of IPv4 has the same port. Processes may share them. existing: sockets
    that listen already; those that fit are used again. Accepted sockets inherit the options (tcp(7)).
    """
    kept = existing or {}
    transparent = config.capture == "tproxy"
    listeners = []
    with contextlib.ExitStack() as undo:
        for at, v6only in places(config):
            sock = kept.get((at, v6only))
            if sock is None:
                sock = undo.enter_context(_listen(at, transparent, v6only))
            elif transparent:
                set_transparent(sock)
            if config.keepalive:
                keep_alive(sock, config.keepalive)
            else:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)
            listeners.append(sock)
        undo.pop_all()
    return listeners


def places(config: ProxyConfig) -> list[ListenAt]:
    """Where to listen, and whether to leave IPv4 to another listener there.

    Without IPv6 in the kernel: on IPv4 alone, and in place of `[::]`, which takes both, on `0.0.0.0`. Raises OSError where that
    leaves no listener.
    """
    taken = {each.port for each in config.listen if ":" not in each.host}
    if "inet6" in families():
        return [(each, each.port in taken) for each in config.listen]
    wanted = [each for each in config.listen if ":" not in each.host or (each.host == "::" and each.port not in taken)]
    if not wanted:
        listen = ", ".join(map(str, config.listen))
        raise OSError(f"cannot listen on {listen}: this kernel speaks no IPv6; name an IPv4 address in listen")
    return [(Endpoint("0.0.0.0", each.port) if each.host == "::" else each, False) for each in wanted]


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
        no_delay(sock)
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise OSError(error.errno, f"cannot listen on {at}: {error.strerror}") from error
    return sock


def raise_limit() -> int:
    """Raise this process's limit of descriptors as far as it may; returns the new limit (RLIMIT_NOFILE, setrlimit(2))."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return soft


class Outcome(Enum):
    """Why it stopped accepting."""

    EMPTY = "no connection waits"
    MORE = "more may wait"
    FULL = "the limit of connections is reached"
    SHORT = "the system is out of descriptors or memory"


class Listeners:
    """The listeners of one process, in its epoll set while it accepts. Several processes may accept from the same sockets."""

    def __init__(
        self,
        sockets: Iterable[socket.socket],
        epoll: select.epoll,
        limit: int,
        accept_many: Callable[[int, int, float], int] | None = None,
    ) -> None:
        """limit: the most connections at once. `resume` has to be called when there is room again.

        accept_many: accepts and takes in place of `take`: descriptor, how many at most, time; 0 or an error's number comes back.
        """
        self._accept_many = accept_many
        self._sockets = {listener.fileno(): listener for listener in sockets}
        self._epoll = epoll
        self.limit = limit
        self.accepting = False
        # The last error as text; when the pause after it ends; and whether connections are accepted at all.
        self.shortage = ""
        self.due: float | None = None
        self._closed = False

    def fit_descriptors(self) -> int | None:
        """Accept no more connections than there are descriptors for. Returns the number of descriptors if they are too few."""
        descriptors = raise_limit()
        possible = max(1, (descriptors - _SPARE) // 2)
        if possible >= self.limit:
            return None
        self.limit = possible
        return descriptors

    def get(self, descriptor: int) -> socket.socket | None:
        """The listener with this descriptor; None if there is none."""
        return self._sockets.get(descriptor)

    @property
    def descriptors(self) -> frozenset[int]:
        """Of its sockets."""
        return frozenset(self._sockets)

    @property
    def waiting(self) -> int:
        """Connections that wait in the kernel's backlogs."""
        return sum(map(backlog_of, self._sockets.values()))

    def resume(self, active: int, now: float) -> None:
        """Accept again if there is room and no pause; called when a connection has ended, and at `due`."""
        if self.due is not None and self.due <= now:
            self.due = None
        if not (self.accepting or self._closed or self.due is not None) and active < self.limit:
            for descriptor in self._sockets:
                # Wake one process of several, not all (epoll_ctl(2)).
                self._epoll.register(descriptor, select.EPOLLIN | select.EPOLLEXCLUSIVE)
            self.accepting = True

    def accept(
        self, listener: socket.socket, active: Callable[[], int], take: Callable[[socket.socket, Address], None], now: float
    ) -> Outcome:
        """Accept what waits at one listener and give each to `take`, until nothing waits or no more can be taken.

        active: how many connections run, `take` included.
        """
        if self._accept_many is not None:
            return self._accept_together(listener, active, now, self._accept_many)
        for _ in range(ACCEPTS):
            if active() >= self.limit:
                self._pause()
                return Outcome.FULL
            try:
                client, address = listener.accept()
            except BlockingIOError:
                return Outcome.EMPTY
            except OSError as error:
                if error.errno in _SHORT_OF:
                    return self._fall_short(error.strerror or "", now)
                # The connection ended before it was accepted (accept(2)).
                continue
            take(client, address)
        return Outcome.MORE

    def _accept_together(
        self, listener: socket.socket, active: Callable[[], int], now: float, accept_many: Callable[[int, int, float], int]
    ) -> Outcome:
        number = 0
        if (room := self.limit - active()) > 0:
            number = accept_many(listener.fileno(), min(room, ACCEPTS), now)
        if number == errno.EAGAIN:
            return Outcome.EMPTY
        if number:
            return self._fall_short(os.strerror(number), now)
        if active() < self.limit:
            return Outcome.MORE
        self._pause()
        return Outcome.FULL

    def drain(self, active: Callable[[], int], take: Callable[[socket.socket, Address], None], now: float) -> None:
        """Accept the connections that wait in the backlogs, then close the sockets."""
        for listener in self._sockets.values():
            while self.accept(listener, active, take, now) is Outcome.MORE:
                pass
        self._pause()
        self._closed = True
        # From now on the process that made them may close the ports.
        for listener in self._sockets.values():
            listener.close()
        self._sockets.clear()

    def _fall_short(self, shortage: str, now: float) -> Outcome:
        self.shortage = shortage
        self._pause()
        self.due = now + PAUSE
        return Outcome.SHORT

    def _pause(self) -> None:
        if self.accepting:
            for descriptor in self._sockets:
                self._epoll.unregister(descriptor)
            self.accepting = False
