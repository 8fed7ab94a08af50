"""Finds the addresses that containers have on bridges: of each port that leads to one, those of the port's other end.

The kernel tells of no address in another namespace by itself. A port is asked when it changes, each second in its first minute,
and every ten seconds after that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from nfq_agent.host.links import Link
from nfq_agent.host.peer_addresses import peer_addresses

# For how many seconds a port that has changed is asked each second; how often it is asked later.
_NEW: Final = 60
_EVERY: Final = 10
# How many ports are asked in one second, so that a thousand containers do not hold up the supervisor. A question takes 80 us.
_AT_ONCE: Final = 100


@dataclass(slots=True)
class _Port:
    """A port of a bridge. seen: how many seconds ago it changed. asked: how many seconds ago, infinite for never."""

    link: Link
    seen: int = 0
    asked: float = math.inf
    addresses: frozenset[bytes] = field(default=frozenset())


class BridgeAddresses:
    """The addresses of containers on bridges."""

    def __init__(self, addresses_of: Callable[[Link], frozenset[bytes]] = peer_addresses) -> None:
        """addresses_of: asks the kernel; raises OSError."""
        self._addresses_of = addresses_of
        self._ports: dict[int, _Port] = {}

    def seen(self, link: Link) -> None:
        """An interface is there, or has changed."""
        if link.master and link.netns is not None:
            known = self._ports.get(link.index)
            addresses = known.addresses if known is not None and known.link.netns == link.netns else frozenset()
            self._ports[link.index] = _Port(link, addresses=addresses)
        else:
            self.gone(link.index)

    def gone(self, index: int) -> None:
        """Forget an interface."""
        self._ports.pop(index, None)

    @property
    def indices(self) -> frozenset[int]:
        """Of the ports that are known."""
        return frozenset(self._ports)

    def later(self) -> None:
        """A second has passed."""
        for port in self._ports.values():
            port.seen += 1
            port.asked += 1

    def on_bridges(self, named: Mapping[int, str]) -> dict[int, dict[bytes, str]]:
        """The container by bridge and address. named: by the port's index.

        An address that two ports of one bridge have leads to no container, unless both lead to the same one.
        """
        self._ask()
        owners: dict[tuple[int, bytes], set[str | None]] = {}
        for index, port in self._ports.items():
            for address in port.addresses:
                owners.setdefault((port.link.master, address), set()).add(named.get(index))
        found: dict[int, dict[bytes, str]] = {}
        for (bridge, address), (name, *others) in owners.items():
            if name is not None and not others:
                found.setdefault(bridge, {})[address] = name
        return found

    def _ask(self) -> None:
        due = [port for port in self._ports.values() if port.asked >= (1 if port.seen <= _NEW else _EVERY)]
        # The one that waits longest comes first, so that each has its turn.
        due.sort(key=lambda port: port.asked, reverse=True)
        for port in due[:_AT_ONCE]:
            port.asked = 0
            try:
                port.addresses = self._addresses_of(port.link)
            except OSError:
                # Its end is gone, or may not be asked about: what is not known is not guessed.
                port.addresses = frozenset()
