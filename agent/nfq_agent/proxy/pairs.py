"""The pairs of one process that run: by key, by descriptor, by source, and by the time when each is looked at next."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Iterator

from nfq_agent.connection import Connection
from nfq_agent.proxy.deadlines import Deadlines
from nfq_agent.proxy.plain_pairs import PlainPair
from nfq_agent.proxy.relay import EVENTS, Half, Pair
from nfq_agent.proxy.settings import ProxySettings
from nfq_agent.proxy.sources import Sources

AnyPair = Pair | PlainPair


@contextlib.contextmanager
def upstream_of(pair: AnyPair) -> Iterator[socket.socket]:
    """The socket to the destination, for its options."""
    if isinstance(pair, Pair):
        yield pair.upstream.sock
        return
    sock = socket.socket(fileno=pair.upstream_fd)
    try:
        yield sock
    finally:
        sock.detach()


class Pairs:
    """Compiled pairs have their descriptors in epoll by themselves; the others have them here."""

    def __init__(self, settings: ProxySettings, sources: Sources, epoll: select.epoll) -> None:
        self.by_key: dict[object, AnyPair] = {}
        self.halves: dict[int, Half] = {}
        # Those with more bytes to move.
        self.again: dict[Half, None] = {}
        self.deadlines: Deadlines[AnyPair] = Deadlines(settings.timeouts)
        self._sources = sources
        self._epoll = epoll

    def __len__(self) -> int:
        return len(self.by_key)

    def opened(self, pair: AnyPair, connection: Connection, now: float) -> None:
        """A pair begins to connect."""
        self.by_key[pair.key] = pair
        self.deadlines.opened(pair, now)
        self._sources.opened(connection.client[0])
        if isinstance(pair, Pair):
            for half in (pair.client, pair.upstream):
                self.halves[half.sock.fileno()] = half
                self._epoll.register(half.sock, EVENTS)

    def forget(self, pair: AnyPair) -> bool:
        """A pair has ended, or its attempt to connect; False if it was forgotten before."""
        if self.by_key.pop(pair.key, None) is None:
            return False
        self.deadlines.gone(pair)
        if pair.connection is not None:
            self._sources.closed(pair.connection.client[0])
        if isinstance(pair, Pair):
            for half in (pair.client, pair.upstream):
                self.halves.pop(half.sock.fileno(), None)
                self.again.pop(half, None)
        return True
