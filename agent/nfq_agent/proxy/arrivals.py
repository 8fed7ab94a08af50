"""What is known of a connection that was just accepted: who it is from, where it was going, and whether it may come in."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from typing import NamedTuple

from nfq_agent.host.sockets import Address, is_local, original_destination, unmapped
from nfq_agent.proxy.dialer import Candidate, Dialer, Refused
from nfq_agent.proxy.settings import ProxySettings
from nfq_agent.proxy.sources import Sources
from nfq_agent.stream import Connection, Stream, StreamChain


class Arrival(NamedTuple):
    """A connection that may come in. route: the addresses to try. stream: None where no element looks at anything."""

    connection: Connection
    route: tuple[Candidate, ...]
    stream: Stream | None


class Arrivals:
    """Looks at each new connection of one process."""

    def __init__(self, chain: StreamChain, settings: ProxySettings, listeners: Iterable[socket.socket]) -> None:
        self._chain = chain
        self._settings = settings
        ports = [port for _, port in settings.own_listeners] + [each.getsockname()[1] for each in listeners]
        self._own_ports = frozenset(ports)
        self.dialer: Dialer[Connection] = Dialer(self.is_own, settings.connect_timeout)
        self.sources = Sources(settings.max_per_source)
        # Unique on this host: process numbers are used again, so a random part is in front.
        self._prefix = os.urandom(4).hex()
        self._serial = 0

    def is_own(self, address: Address) -> bool:
        """Whether an address is a listener of the agent."""
        return address[1] in self._own_ports and is_local(address[0])

    def identity(self) -> str:
        """The next connection's id."""
        self._serial += 1
        return f"{self._prefix}-{self._serial:x}"

    def look_at(self, client: socket.socket, address: Address, now: float) -> Arrival | Refused:
        """A connection that was accepted from this address. Raises OSError."""
        destination: Address | None
        if self._settings.capture == "tproxy":
            destination = unmapped(client.getsockname())
        else:
            destination = original_destination(client, address)
        host, port = unmapped(address)[:2]
        if why := self.sources.refuses(host):
            return Refused(why)
        route = self.dialer.route(None if destination is None else _candidate(destination))
        if isinstance(route, Refused):
            return route
        original = None if destination is None else destination[:2]
        connection = Connection(self.identity(), (host, port), original, route[0][1][:2], now, now)
        stream = Stream(connection, self._chain, self._settings.chunk, self._settings.on_error) if len(self._chain) else None
        return Arrival(connection, route, stream)


def _candidate(address: Address) -> Candidate:
    return (socket.AF_INET6 if len(address) > 2 else socket.AF_INET), address
