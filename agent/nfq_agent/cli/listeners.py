"""Whether this host lets the agent listen where its proxies are to, and send packets of its own; `doctor` and a start ask."""

from __future__ import annotations

import errno
import socket

from nfq_agent.config.models import Config
from nfq_agent.service.control import ControlError, NotRunning
from nfq_agent.values import Endpoint


def listener_faults(config: Config) -> list[str]:
    """A line for each thing that this host or unit does not allow: a listener that another process holds, packets of our own.

    Listeners of the running agent of this instance are its own.
    """
    wanted = [(name, endpoint) for name, proxy in config.proxy.items() for endpoint in proxy.listen]
    answering = [
        f"queue.{name}.elements"
        for name, queue in config.queue.items()
        if any(spec.cls.injects_of(spec.options) for spec in config.packet_elements(queue))
    ]
    if (wanted or answering) and _ip_denied():
        return [
            f"configuration: {key}: this service may not send IP packets of its own (IPAddressDeny=any of its unit), which "
            f"{what}; allowed: the drop-in {file} of the unit, see nfq-agent(8)"
            for key, what, file in (
                *((("proxy", "a proxy does", "proxy.conf"),) if wanted else ()),
                *((key, "`reject` and `chaos` do", "reject.conf") for key in answering),
            )
        ]
    if not wanted:
        return []
    # Most agents have no listener, and no start is to wait for it.
    from nfq_agent.cli.running import status
    from nfq_agent.service.status import StatusError

    try:
        ours = {text for proxy in status(config.agent.instance, 5.0).proxies for text in proxy.listen}
    except NotRunning:
        ours = set()
    except (ControlError, StatusError):
        # An agent runs and does not answer this process: the listeners may be its own.
        ours = {str(endpoint) for _, endpoint in wanted}
    faults = []
    for name, endpoint in wanted:
        if str(endpoint) not in ours and (reason := _cannot_bind(endpoint)):
            faults.append(
                f"configuration: proxy.{name}.listen: {endpoint} {reason}; allowed: a free address and port of this host"
            )
    return faults


def _ip_denied() -> bool:
    """Whether systemd keeps this process from sending: a datagram to itself is refused (systemd.resource-control(5))."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(("127.0.0.1", 0))
            probe.sendto(b"", probe.getsockname())
        except PermissionError:
            return True
        except OSError:
            return False
    return False


def _cannot_bind(endpoint: Endpoint) -> str:
    family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind((endpoint.host, endpoint.port))
            # Two may bind with SO_REUSEADDR; only one may listen.
            probe.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return "is in use by another process"
        if error.errno in (errno.EAFNOSUPPORT, errno.EACCES):
            return ""
        return f"cannot be bound: {error.strerror or error}"
    return ""
