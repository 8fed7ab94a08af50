"""The families of IP that this kernel speaks."""

from __future__ import annotations

import functools
import socket
from typing import Final

from nfq_agent.rules.model import Family

ADDRESS_FAMILIES: Final[dict[Family, socket.AddressFamily]] = {"inet": socket.AF_INET, "inet6": socket.AF_INET6}


@functools.cache
def families() -> tuple[Family, ...]:
    """Those for which there are sockets: with `ipv6.disable=1` there are none of IPv6, and no packets."""
    return tuple(family for family, number in ADDRESS_FAMILIES.items() if _is_spoken(number))


def _is_spoken(number: socket.AddressFamily) -> bool:
    try:
        socket.socket(number, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC).close()
    except OSError:
        return False
    return True
