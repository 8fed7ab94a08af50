"""The containers of forwarded flows, by the interfaces that a queue's packets come from and go to.

The supervisor follows the interfaces and writes the names into memory that it shares with the queue's worker.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Mapping
from struct import Struct
from types import MappingProxyType
from typing import Any, Final

from nfq_agent.config.models import Config
from nfq_agent.host import pairs
from nfq_agent.host.links import Links, links
from nfq_agent.log import Log
from nfq_agent.owner import Owners
from nfq_agent.packet import Hook, Packet
from nfq_agent.service.container_search import ContainerSearch, containers_of

_NOTHING: Final[Mapping[str, str]] = MappingProxyType({})
_HOOKS: Final = frozenset(("prerouting", "forward", "postrouting"))
_SIZE: Final = 1 << 20
# A number that is odd while the names are being written, and their length.
_HEAD: Final = Struct("=QQ")


class ContainerNames:
    """The container behind each interface, in memory that is shared: one process writes, those that it forks read."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _SIZE)
        self._numbers = memoryview(self._memory).cast("Q")
        self._read = 0
        self._names: dict[int, str] = {}

    def write(self, names: Mapping[int, str]) -> None:
        """Replace the names. Raises ValueError if they do not fit into a megabyte."""
        data = json.dumps({str(index): name for index, name in names.items()}).encode()
        if len(data) > _SIZE - _HEAD.size:
            raise ValueError(f"the names of {len(names)} containers do not fit into {_SIZE} bytes")
        self._numbers[0] += 1
        self._numbers[1] = len(data)
        self._memory[_HEAD.size : _HEAD.size + len(data)] = data
        self._numbers[0] += 1

    def read(self) -> Mapping[int, str]:
        """The names; those of before while new ones are being written."""
        number = self._numbers[0]
        if number == self._read or number % 2:
            return self._names
        data = bytes(self._memory[_HEAD.size : _HEAD.size + self._numbers[1]])
        if number == self._numbers[0]:
            self._names = {int(index): name for index, name in json.loads(data).items()}
            self._read = number
        return self._names


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
        """The same, where the interface alone tells it."""
        return self._containers(packet) if packet.hook in (Hook.FORWARD, Hook.PREROUTING) else _NOTHING

    def _containers(self, packet: Packet) -> Mapping[str, Any]:
        names = self._names.read()
        # Behind a bridge the port is what leads to one container; the kernel tells it with br_netfilter.
        comes = names.get(packet.physindev) or names.get(packet.indev)
        goes = names.get(packet.physoutdev) or names.get(packet.outdev)
        if comes is None or goes is None or comes == goes:
            one = comes or goes
            return _NOTHING if one is None else {"container": one}
        return {"container": comes, "container_to": goes}


class Forwarded:
    """The supervisor's side: follows all interfaces while rules lead forwarded traffic to the queue."""

    def __init__(self, config: Config, queue: str, log: Log) -> None:
        """queue: its name in the configuration."""
        self.sockets = config.agent.container_sockets
        self.wanted = any(rule.queue == queue and _HOOKS & set(rule.hooks) for rule in config.rules.values())
        """Whether rules lead traffic to the queue that the host forwards."""
        self._queue = queue
        self._log = log
        self._names = ContainerNames() if self.wanted else None
        self._links: Links | None = None
        self._search = ContainerSearch(containers_of(self.sockets, log))

    def open(self) -> None:
        """Begin to follow interfaces. Raises OSError."""
        if self._names is None or self._links is not None:
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
        """The socket that reports interfaces, and the function to call then."""
        return {} if self._links is None else {self._links.fileno(): self._changed}

    def look(self) -> None:
        """Called once a second."""
        if self._links is not None:
            self._tell(self._search.later())

    def owners(self, host: Owners) -> Owners:
        """In the worker's process: who a flow belongs to. host: for flows of the host's own sockets."""
        return host if self._names is None else ForwardedOwners(self._names, host)

    def differs(self, other: Forwarded) -> bool:
        """Whether another process is needed for it."""
        return (self.wanted, self.sockets) != (other.wanted, other.sockets)

    def _resume(self) -> None:
        present = {link.index: link for link in links() if not pairs.is_end(link)}
        for index in self._search.named.keys() - present.keys():
            self._search.gone(index)
        for link in present.values():
            self._search.seen(link)
        self._tell(self._search.found(), always=True)

    def _changed(self) -> None:
        assert self._links is not None
        changes = self._links.changes()
        if changes is None:
            # Too many for the socket's buffer.
            self._resume()
            return
        lost = False
        for link, is_gone in changes:
            if is_gone:
                lost |= link.index in self._search.named
                self._search.gone(link.index)
            elif not pairs.is_end(link):
                self._search.seen(link)
        self._tell(self._search.found(), always=lost)

    def _tell(self, new: Mapping[int, str], always: bool = False) -> None:
        assert self._names is not None
        if not new and not always:
            return
        try:
            self._names.write(self._search.named)
        except ValueError as error:
            self._log(f"queue {self._queue}: {error}; their flows are judged without", "error")
