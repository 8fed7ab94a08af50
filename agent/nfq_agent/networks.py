"""Values by network, longest prefix first: a look-up costs one dictionary per prefix length in use, however many networks."""

from __future__ import annotations

from collections.abc import Iterable

from nfq_agent.values import Network


class NetworkMap:
    """For each address the bits (an int) of all networks that contain it, and `base` for every address."""

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
    """Tables from the longest prefix to the shortest; the bits of a wider network are also in the narrower ones inside it."""
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
