"""The name of a network interface by its index, also in a worker that may open no socket any more."""

from __future__ import annotations

import fcntl
import functools
import socket
import struct
from collections.abc import Callable
from typing import Final

# linux/sockios.h; struct ifreq of linux/if.h: the name, then the index.
_SIOCGIFNAME: Final = 0x8910
_IFREQ: Final = struct.Struct("16si20x")


@functools.cache
def name_lookup() -> Callable[[int], str]:
    """A function that asks the kernel for a name, over a socket that is opened now; it raises OSError for an index that is gone.

    socket.if_indextoname opens a socket for each question (netdevice(7)).
    """
    # Open as long as the process: elements keep the function until they end.
    descriptor = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC).detach()

    def name_of(index: int) -> str:
        answer = fcntl.ioctl(descriptor, _SIOCGIFNAME, _IFREQ.pack(b"", index))
        name: bytes = _IFREQ.unpack(answer)[0]
        return name.rstrip(b"\0").decode(errors="replace")

    return name_of
