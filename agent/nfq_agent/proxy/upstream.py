"""Opens the sockets that lead from the proxy to the destinations."""

from __future__ import annotations

import errno
import os
import socket
from typing import Final

from nfq_agent.host.sockets import bind_as, no_delay, set_mark
from nfq_agent.proxy.dialer import Candidate
from nfq_agent.proxy.settings import ProxySettings

_UNDER_WAY: Final = (0, errno.EINPROGRESS)


def connect(to: Candidate, client: tuple[str, int] | None, settings: ProxySettings) -> socket.socket:
    """A non-blocking socket that connects, or is connected already. Raises OSError where that fails at once.

    client: the source address that the destination sees; None for this host's own.
    """
    family, address = to
    upstream = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        no_delay(upstream)
        if settings.mark:
            set_mark(upstream, settings.mark)
        if client is not None and (":" in client[0]) == (family == socket.AF_INET6):
            bind_as(upstream, client)
        # Not connect(): its exception, raised each time, costs as much as the rest of this function.
        if (refused := upstream.connect_ex(address)) not in _UNDER_WAY:
            raise OSError(refused, os.strerror(refused))
    except OSError:
        upstream.close()
        raise
    return upstream
