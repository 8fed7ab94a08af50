"""`[inline]` as tests configure it, and what it has attached."""

from __future__ import annotations

import socket
from typing import Any

from agent import Agent, until
from containers import interfaces, packet_sockets
from namespace import Namespace

from nfq_agent.host import bpf

INLINE = """
[inline.pods]
interfaces = ["veth*"]
tcp_ports = [8080]
udp_ports = [7]
elements = [{elements}]
{more}
[element.verdicts]
type = "policy"
default = "accept"
rule = [ {{ action = "{action}", http_host = ["*.blocked.test"] }} ]
[element.offload]
mark = "0x4e000000/0xff000000"
[element.slow]
type = "sleeping:Sleeper"
seconds = 0.01
"""


def config(elements: str = '"dpi", "verdicts"', more: str = "", action: str = "drop") -> str:
    return INLINE.format(elements=elements, more=more, action=action)


def inline_of(agent: Agent) -> dict[str, Any]:
    (found,) = agent.status()["inlines"]
    return {**found, **found["counters"]}


def all_judged(agent: Agent) -> dict[str, Any]:
    """The counts, once all that came up is judged: the last packet of a connection comes behind what its client waits for."""

    def counts() -> dict[str, Any] | None:
        found = inline_of(agent)
        return found if found["up"] == found["judged"] else None

    found: dict[str, Any] = until(counts, "all that came up is judged")
    return found


def attached(host: Namespace) -> int:
    """How many programs are attached to interfaces of the host by links."""
    return sum(int(host.call(_programs, name)) for name in interfaces(host))


def _programs(name: str) -> int:
    try:
        index = socket.if_nametoindex(name)
    except OSError:
        # It has gone since it was listed.
        return 0
    return sum(len(bpf.query(index, side).programs) for side in (bpf.TCX_INGRESS, bpf.TCX_EGRESS))


def gone(host: Namespace) -> bool:
    return attached(host) == 0 and packet_sockets(host) == 0 and not any(name.startswith("nfq") for name in interfaces(host))
