"""What is known of a connection that was just accepted: its client, its original destination, and whether it is accepted."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from typing import Final, NamedTuple

from nfq_agent.host.jail.calls import Sends
from nfq_agent.host.sock_diag import KernelQuestions
from nfq_agent.host.sockets import Address, original_destination, unmapped
from nfq_agent.proxy.dialer import Candidate, Dialer, Refused
from nfq_agent.proxy.plain_pairs import PlainPair, PlainPairs
from nfq_agent.proxy.settings import ProxySettings
from nfq_agent.proxy.sources import Sources
from nfq_agent.rate import Bucket
from nfq_agent.stream import Connection, Stream, StreamChain

# Connections a second that are checked for a loop: at 20 us each, 0.2 percent of the time at most.
CHECKS: Final = 100.0
LOOP: Final = (
    "it comes from a proxy of nfq-agent: a rule redirects the proxy's own connections to it; exclude the agent's user there "
    "(-m owner ! --uid-owner USER)"
)


class Arrival(NamedTuple):
    """A connection that is accepted. route: the addresses to try. stream: None where no element looks at anything."""

    connection: Connection
    route: tuple[Candidate, ...]
    stream: Stream | None


class Arrivals:
    """Checks each new connection of one process."""

    def __init__(self, chain: StreamChain, settings: ProxySettings, listeners: Iterable[socket.socket]) -> None:
        self._chain = chain
        self._uid = os.geteuid()
        self._settings = settings
        ports = [port for _, port in settings.own_listeners] + [each.getsockname()[1] for each in listeners]
        self._own_ports = frozenset(ports)
        self.dialer: Dialer[Connection | PlainPair] = Dialer(self.is_own, settings.connect_timeout)
        self.sources = Sources(settings.max_per_source)
        self._kernel = KernelQuestions()
        self._checks = Bucket(CHECKS, CHECKS, 0.0)
        # Unique on this host: process ids are reused, so a random part precedes them.
        self._prefix = os.urandom(4).hex()
        self._serial = 0

    def is_own(self, address: Address) -> bool:
        """Whether an address is a listener of the agent."""
        return address[1] in self._own_ports and self._kernel.is_local(address[0]) is not False

    def is_second_hop(self, peer: tuple[str, int], destination: tuple[str, int]) -> bool:
        """Whether a connection comes from a proxy of nfq-agent: a foreign rule redirected it here again.

        Its socket on this host shows it, by its mark or its user. In a flood not every connection is checked; a loop is then
        found a few connections later.
        """
        owner = self._kernel.socket_of(peer, destination)
        if owner is None:
            return False
        mark = self._settings.own_mark
        return owner.uid == self._uid or (owner.mark is not None and owner.mark & mark.mask == mark.value)

    def as_client(self, connection: Connection, destination: Address) -> tuple[str, int] | None:
        """The source address that a destination sees; None for this host's own.

        A server on this host would answer a client's address over the network, and not this proxy.
        """
        if not self._settings.keep_client or self._kernel.is_local(destination[0]):
            return None
        return connection.client

    @property
    def questions(self) -> Sends:
        """Its fixed questions to the kernel."""
        return self._kernel.sends

    def close(self) -> None:
        """Close the sockets to the kernel."""
        self._kernel.close()

    def identity(self) -> str:
        """The next connection's id."""
        self._serial += 1
        return f"{self._prefix}-{self._serial:x}"

    def go_straight(self, pairs: PlainPairs) -> bool:
        """Let plain pairs connect by themselves, if nothing but the original destination and the number of checks matters."""
        settings = self._settings
        if len(self._chain) or settings.max_per_source or settings.keep_client:
            return False
        tproxy = settings.capture == "tproxy"
        pairs.go_straight(tproxy, settings.mark, self._own_ports, CHECKS, self.is_second_hop)
        return True

    def connection_of(self, pair: PlainPair) -> Connection:
        """What is known of a pair; first made here for one that connected by itself."""
        if pair.connection is not None:
            return pair.connection
        client, destination = (address[:2] for address in pair.addresses)
        pair.connection = Connection(self.identity(), client, destination, destination, pair.opened, pair.opened, *pair.counted)
        return pair.connection

    def look_at(self, client: socket.socket, address: Address, now: float, due: bool = False) -> Arrival | Refused:
        """A connection that was accepted from this address. due: it is to be checked for a loop. Raises OSError."""
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
        if route[0][1] is destination and (due or self._checks.take(now)) and self.is_second_hop((host, port), destination[:2]):
            return Refused(LOOP)
        original = None if destination is None else destination[:2]
        connection = Connection(self.identity(), (host, port), original, route[0][1][:2], now, now)
        stream = Stream(connection, self._chain, self._settings.chunk, self._settings.on_error) if len(self._chain) else None
        return Arrival(connection, route, stream)


def _candidate(address: Address) -> Candidate:
    return (socket.AF_INET6 if len(address) > 2 else socket.AF_INET), address
