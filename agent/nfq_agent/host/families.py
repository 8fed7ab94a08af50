"""The families of IP that this kernel speaks."""

from __future__ import annotations

import errno
import functools
import os
import socket
from typing import Final

from nfq_agent.rules.model import Family

ADDRESS_FAMILIES: Final[dict[Family, socket.AddressFamily]] = {"inet": socket.AF_INET, "inet6": socket.AF_INET6}
# Made by the kernel with the sockets of the family: not with ipv6.disable=1 (inet6_init(), net/ipv6/af_inet6.c).
_SETTINGS: Final = {socket.AF_INET: "/proc/sys/net/ipv4", socket.AF_INET6: "/proc/sys/net/ipv6"}


def families() -> tuple[Family, ...]:
    """Those for which there are sockets: with `ipv6.disable=1` there are none of IPv6, and no packets.

    A family that cannot be tested now, for lack of descriptors or memory, is one of them: rules of it may be in the kernel.
    """
    return tuple(family for family, number in ADDRESS_FAMILIES.items() if _may_be_spoken(number))


def _may_be_spoken(number: socket.AddressFamily) -> bool:
    try:
        return _is_spoken(number)
    except OSError:
        return True


@functools.cache
def _is_spoken(number: socket.AddressFamily) -> bool:
    """Raises OSError where that cannot be told now; only an answer is kept."""
    try:
        socket.socket(number, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC).close()
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT:
            raise
        # The drop-in owned.conf (RestrictAddressFamilies=) answers the same for a family that the kernel speaks.
        return os.path.exists(_SETTINGS[number])
    return True
