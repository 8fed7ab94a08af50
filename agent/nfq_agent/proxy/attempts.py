"""Carries out the dialer's commands: opens the sockets that connect, until one has connected or no address is left."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable, Iterable

from nfq_agent.connection import Connection
from nfq_agent.host.sockets import reset
from nfq_agent.proxy.arrivals import Arrivals
from nfq_agent.proxy.dialer import Connect, GiveUp
from nfq_agent.proxy.lines import Lines
from nfq_agent.proxy.pairs import AnyPair, Pairs
from nfq_agent.proxy.plain_pairs import PlainPair, PlainPairs
from nfq_agent.proxy.relay import Pair
from nfq_agent.proxy.settings import ProxySettings
from nfq_agent.proxy.tally import Tally
from nfq_agent.proxy.upstream import connect
from nfq_agent.stream import Output, Stream
from nfq_agent.values import Endpoint

Key = Connection | PlainPair


class Attempts:
    """The attempts to connect of one process."""

    def __init__(
        self,
        settings: ProxySettings,
        arrivals: Arrivals,
        pairs: Pairs,
        plain: PlainPairs | None,
        epoll: select.epoll,
        tally: Tally,
        lines: Lines,
        failures: Callable[[Connection, Iterable[Output]], None],
    ) -> None:
        """plain: carries pairs without a stream; None where relay.py does. failures: logs what elements raised."""
        self._settings = settings
        self._arrivals = arrivals
        self._dialer = arrivals.dialer
        self._pairs = pairs
        self._plain = plain
        self._epoll = epoll
        self._tally = tally
        self._lines = lines
        self._failures = failures
        # Those that failed in this turn of the loop, each with its client.
        self._failed: list[tuple[AnyPair, Connection, socket.socket, str]] = []

    def run(
        self,
        command: Connect[Key] | GiveUp[Key],
        client: socket.socket,
        connection: Connection,
        stream: Stream | None,
        now: float,
    ) -> None:
        """Until an attempt is running, or no address is left."""
        while isinstance(command, Connect):
            try:
                connection.upstream = command.to[1][:2]
                upstream = connect(command.to, self._arrivals.as_client(connection, command.to[1]), self._settings)
            except OSError as error:
                command = self._dialer.failed(command.key, error.strerror or str(error), now)
                continue
            self._pairs.opened(self._pair(command.key, client, upstream, connection, stream, now), connection, now)
            return
        self._tally.add("failed_upstream")
        self._lines.unreachable(connection, command.reason, now)
        if stream is not None:
            reason = f"cannot connect to {Endpoint(*connection.upstream)}: {command.reason}"
            self._failures(connection, stream.finished(now, reason))
        reset(client)

    def fail(self, pair: PlainPair, number: int, now: float) -> None:
        """A pair that could not connect to its only address, by this error."""
        connection = self._arrivals.connection_of(pair)
        self.run(GiveUp(pair, os.strerror(number)), socket.socket(fileno=pair.abandon()), connection, None, now)

    def unreachable(self, pair: AnyPair, reason: str) -> None:
        """An attempt has failed: at the end of this turn, the next address or the end."""
        self._pairs.forget(pair)
        if isinstance(pair, PlainPair):
            connection = self._arrivals.connection_of(pair)
            client = socket.socket(fileno=pair.abandon())
        else:
            connection, client = pair.connection, pair.client.sock
            self._epoll.unregister(client)
            pair.upstream.sock.close()
        self._failed.append((pair, connection, client, reason))

    def again(self, now: float) -> None:
        """Continue with the attempts that failed in this turn."""
        failed, self._failed = self._failed, []
        for pair, connection, client, reason in failed:
            command = self._dialer.failed(pair.key, reason, now)
            self.run(command, client, connection, pair.stream if isinstance(pair, Pair) else None, now)

    def _pair(
        self, key: Key, client: socket.socket, upstream: socket.socket, connection: Connection, stream: Stream | None, now: float
    ) -> AnyPair:
        if stream is not None or self._plain is None:
            return Pair(connection, client, upstream, stream, self._tally.bytes, self._settings.buffer)
        pair = self._plain.adopt(client.fileno(), upstream.fileno(), key, connection, now)
        for each in (client, upstream):
            each.detach()
        return pair
