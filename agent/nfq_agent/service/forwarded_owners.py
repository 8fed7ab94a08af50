"""The containers of forwarded flows, by the interfaces that a queue's packets come from and go to, and by addresses on bridges.

The supervisor follows the interfaces and writes the names into memory that it shares with the queue's worker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from nfq_agent.config.models import Config
from nfq_agent.host import pairs
from nfq_agent.host.links import Link, Links, links
from nfq_agent.log import Log
from nfq_agent.owner import Owners
from nfq_agent.packet import Hook, Packet, PacketError
from nfq_agent.service.bridge_addresses import BridgeAddresses
from nfq_agent.service.container_names import Behind, ContainerNames
from nfq_agent.service.container_search import ContainerSearch, containers_of
from nfq_agent.service.forwarded import Forwarded

_NOTHING: Final[Mapping[str, str]] = MappingProxyType({})


class ForwardedOwners(Owners):
    """What the host knows of a flow's owner; for a flow that is forwarded, the container that it comes from, or goes to.

    container_to: the container that it goes to, where it comes from another one.
    """

    def __init__(self, names: ContainerNames, host: Owners) -> None:
        """host: for flows of the host's own sockets."""
        self._names = names
        self._host = host

    def names(self, packet: Packet) -> Mapping[str, Any]:
        """The owner."""
        if packet.hook == Hook.FORWARD:
            return self._containers(packet)
        found = self._host.names(packet)
        return found if found or packet.hook not in (Hook.PREROUTING, Hook.POSTROUTING) else self._containers(packet)

    def known(self, packet: Packet) -> Mapping[str, Any]:
        """The same, where the interface and the addresses alone tell it."""
        return self._containers(packet) if packet.hook in (Hook.FORWARD, Hook.PREROUTING) else _NOTHING

    def _containers(self, packet: Packet) -> Mapping[str, Any]:
        behind = self._names.read()
        # Behind a bridge the port is what leads to one container; the kernel tells it with br_netfilter. Without that the address
        # on the bridge does.
        port = behind.links.get
        comes = port(packet.physindev) or port(packet.indev) or _at(behind, packet.indev, packet, 0)
        goes = port(packet.physoutdev) or port(packet.outdev) or _at(behind, packet.outdev, packet, 1)
        if comes is None or goes is None or comes == goes:
            one = comes or goes
            return _NOTHING if one is None else {"container": one}
        return {"container": comes, "container_to": goes}


def _at(behind: Behind, bridge: int, packet: Packet, end: int) -> str | None:
    """The container that has an address of the packet on this bridge. end: 0 for the source, 1 for the destination."""
    addresses = behind.bridges.get(bridge)
    if addresses is None:
        return None
    try:
        five_tuple = packet.headers.five_tuple
    except PacketError:
        return None
    return addresses.get((five_tuple.src, five_tuple.dst)[end])


class FollowedInterfaces(Forwarded):
    """The supervisor's side of a queue to which rules lead forwarded traffic: follows all interfaces."""

    def __init__(self, config: Config, queue: str, log: Log) -> None:
        super().__init__(config)
        self._queue = queue
        self._log = log
        self._names = ContainerNames()
        self._links: Links | None = None
        self._search = ContainerSearch(containers_of(self.sockets, log))
        self._addresses = BridgeAddresses()
        self._told = Behind()

    def open(self) -> None:
        """Begin to follow interfaces. Raises OSError."""
        if self._links is not None:
            return
        self._links = Links()
        self._resume()

    def close(self) -> None:
        """Stop."""
        if self._links is not None:
            self._links.close()
            self._links = None

    @property
    def follows(self) -> dict[int, Callable[[], None]]:
        """The socket that reports interfaces, and the function that reads it."""
        return {} if self._links is None else {self._links.fileno(): self._changed}

    def look(self) -> None:
        """Called once a second."""
        if self._links is not None:
            self._search.later()
            self._addresses.later()
            self._tell()

    def owners(self, host: Owners) -> Owners:
        """In the worker's process: who a flow belongs to. host: for flows of the host's own sockets."""
        return ForwardedOwners(self._names, host)

    def _resume(self) -> None:
        present = {link.index: link for link in links() if not pairs.is_end(link)}
        for index in (self._search.named.keys() | self._addresses.indices) - present.keys():
            self._gone(index)
        for link in present.values():
            self._seen(link)
        self._search.found()
        self._tell()

    def _changed(self) -> None:
        assert self._links is not None
        changes = self._links.changes()
        if changes is None:
            # Too many for the socket's buffer.
            self._resume()
            return
        for link, is_gone in changes:
            if is_gone:
                self._gone(link.index)
            elif not pairs.is_end(link):
                self._seen(link)
        self._search.found()
        self._tell()

    def _seen(self, link: Link) -> None:
        self._search.seen(link)
        self._addresses.seen(link)

    def _gone(self, index: int) -> None:
        self._search.gone(index)
        self._addresses.gone(index)

    def _tell(self) -> None:
        """Write what leads to a container now, if it is not what was written before."""
        named = dict(self._search.named)
        behind = Behind(named, self._addresses.on_bridges(named))
        if behind == self._told:
            return
        self._told = behind
        try:
            self._names.write(behind)
        except ValueError as error:
            self._log(f"queue {self._queue}: {error}; their flows are judged without", "error")
