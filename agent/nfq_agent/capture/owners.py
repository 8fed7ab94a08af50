"""The containers behind the interfaces of a tap or an inline link, as the supervisor tells its worker."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import quote, unquote

from nfq_agent.owner import Owners
from nfq_agent.packet import Packet

_NOTHING: Final[Mapping[str, str]] = MappingProxyType({})


class InterfaceOwners(Owners):
    """The container of a packet is the one behind its interface."""

    def __init__(self) -> None:
        self._by_interface: dict[int, Mapping[str, str]] = {}

    def name(self, index: str, name: str) -> None:
        """Note the container behind an interface. name: as `told` writes it."""
        self._by_interface[int(index)] = {"container": unquote(name)}

    def gone(self, index: str) -> None:
        """Forget an interface."""
        self._by_interface.pop(int(index), None)

    def names(self, packet: Packet) -> Mapping[str, Any]:
        """The container; nothing where it is not known."""
        return self._by_interface.get(packet.indev or packet.outdev, _NOTHING)

    def known(self, packet: Packet) -> Mapping[str, Any]:
        """The same."""
        return self.names(packet)


def told(index: int, name: str) -> str:
    """The line that tells a worker the container behind an interface."""
    return f"container {index} {quote(name, safe='')}"
