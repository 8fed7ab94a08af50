"""What a process of a proxy needs of the kernel once it accepts connections. Pure: settings in, needs out."""

from __future__ import annotations

import socket
from typing import Final

from nfq_agent.host.jail.calls import ProcessNeeds, Sends
from nfq_agent.host.sockets import IP_TRANSPARENT, IPV6_TRANSPARENT, SO_MARK, SO_ORIGINAL_DST
from nfq_agent.proxy.settings import ProxySettings
from nfq_agent.proxy.target import is_literal

_TCP: Final = socket.IPPROTO_TCP
# On each connection; no option of IP, where rules are replaced.
_SETS: Final = (
    *((socket.SOL_SOCKET, name) for name in (socket.SO_KEEPALIVE, socket.SO_LINGER)),
    *((_TCP, name) for name in (socket.TCP_NODELAY, socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)),
)
_GETS: Final = ((socket.SOL_IP, SO_ORIGINAL_DST), (socket.IPPROTO_IPV6, SO_ORIGINAL_DST), (_TCP, socket.TCP_INFO))
_AS_CLIENT: Final = (
    (socket.SOL_SOCKET, socket.SO_REUSEADDR),
    (socket.SOL_IP, IP_TRANSPARENT),
    (socket.IPPROTO_IPV6, IPV6_TRANSPARENT),
)
# Where the C library looks names up (resolv.conf(5), nsswitch.conf(5), gai.conf(5)).
_RESOLVER_FILES: Final = (
    "/etc/resolv.conf", "/etc/hosts", "/etc/host.conf", "/etc/nsswitch.conf", "/etc/gai.conf", "/run/systemd/resolve",
)  # fmt: skip


def needs_of(settings: ProxySettings, questions: Sends, has_siblings: bool) -> ProcessNeeds:
    """Accept and connect, and what the settings ask for besides. questions: KernelQuestions.sends."""
    named = settings.target is not None and not is_literal(settings.target[0])
    sets = _SETS
    if settings.mark:
        sets += ((socket.SOL_SOCKET, SO_MARK),)
    if settings.keep_client:
        sets += _AS_CLIENT
    return ProcessNeeds(
        sends=questions,
        accepts=True,
        connects=True,
        binds=settings.keep_client,
        sets=tuple((int(level), int(name)) for level, name in sets),
        gets=tuple((int(level), int(name)) for level, name in _GETS),
        # The name is looked up until there is an answer.
        datagrams=named,
        threads=named,
        reads=_RESOLVER_FILES if named else (),
        children=has_siblings,
    )
