"""The answer of a policy to a flow that an agent reported, by its ends, its facts and its owner. No kernel, no agent."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Any, Final

from nfq_agent.cli.given_owner import GivenOwner
from nfq_agent.cli.question import Question, has_ports
from nfq_agent.context import Context
from nfq_agent.element import Needs
from nfq_agent.elements.policy import Policy
from nfq_agent.flow import Flow
from nfq_agent.packet import Hook, Packet
from nfq_agent.values import Endpoint
from nfq_agent.verdict import ACCEPT

# Any address: proposed rules do not ask for the client.
_CLIENT: Final = {4: "192.0.2.1", 6: "2001:db8::1"}
_CLIENT_PORT: Final = 40000


@dataclass(frozen=True, slots=True)
class SeenFlow:
    """A flow, without what differs from one client to the next. facts, owner: names with values."""

    queue: str
    protocol: str
    destination: str
    port: int | None
    hook: str
    facts: tuple[tuple[str, Any], ...]
    owner: tuple[tuple[str, str], ...]

    @property
    def packet(self) -> Packet:
        """A packet of it, with data."""
        protocol = self.protocol.removeprefix("proto-")
        ends = [_CLIENT[ipaddress.ip_address(self.destination).version], self.destination]
        if has_ports(protocol):
            ends = [str(Endpoint(host, port)) for host, port in zip(ends, (_CLIENT_PORT, self.port or 0), strict=True)]
        hook = self.hook if self.hook in Hook.__members__ else Hook.OUTPUT.name
        return Question(protocol, ends[0], ends[1], hook=hook.lower()).packet(b"data")


def accepts(policy: Policy, sample: SeenFlow) -> bool:
    """Whether a policy accepts the flow, once all its facts are known."""
    policy.context = Context(owners=GivenOwner(dict(sample.owner)))
    packet = sample.packet
    flow = Flow(packet.headers.five_tuple, 1.0, 1.0, packets=1)
    flow.facts |= {"dpi": "decided", **dict(sample.facts)}
    return policy.decide(packet, flow if policy.needs is Needs.FLOW else None) is ACCEPT
