"""Values by network, longest prefix first: a look-up costs one dictionary per prefix length in use, however many networks."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Annotated, TypeAlias

from pydantic import BeforeValidator

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


def _network(value: object) -> Network:
    if isinstance(value, ipaddress.IPv4Network | ipaddress.IPv6Network):
        return value
    allowed = 'allowed: an address, or a network as "10.0.0.0/8" or "fd00::/8"'
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no network; {allowed}")
    try:
        return ipaddress.ip_network(value)
    except ValueError:
        try:
            near = ipaddress.ip_network(value, strict=False)
        except ValueError:
            raise ValueError(f"{value!r} is no network; {allowed}") from None
        raise ValueError(f"{value!r} has bits set behind its prefix (did you mean {str(near)!r}?); {allowed}") from None


NetworkField = Annotated[Network, BeforeValidator(_network)]


class NetworkMap:
    """For each address the bits (an int) of all networks that hold it, and `base` for every address."""

    def __init__(self, networks: Iterable[tuple[Network, int]], base: int = 0) -> None:
        by_length: dict[int, dict[int, dict[int, int]]] = {4: {}, 6: {}}
        for network, bits in networks:
            shift = network.max_prefixlen - network.prefixlen
            table = by_length[network.version].setdefault(shift, {})
            key = int(network.network_address) >> shift
            table[key] = table.get(key, 0) | bits
        self._base = base
        self._v4 = _nested(by_length[4], base)
        self._v6 = _nested(by_length[6], base)

    def look_up(self, address: bytes) -> int:
        """The bits for a packed address of 4 or 16 bytes."""
        number = int.from_bytes(address, "big")
        for shift, table in self._v4 if len(address) == 4 else self._v6:
            bits = table.get(number >> shift)
            if bits is not None:
                return bits
        return self._base


def _nested(by_shift: dict[int, dict[int, int]], base: int) -> tuple[tuple[int, dict[int, int]], ...]:
    """Tables from the longest prefix to the shortest; what a wider network says is in the narrower ones that it holds."""
    wider: list[tuple[int, dict[int, int]]] = []
    for shift in sorted(by_shift, reverse=True):
        table = {}
        for key, bits in by_shift[shift].items():
            inherited = base
            for wide, other in wider:
                found = other.get(key >> (wide - shift))
                if found is not None:
                    inherited = found
                    break
            table[key] = bits | inherited
        wider.insert(0, (shift, table))
    return tuple(wider)
