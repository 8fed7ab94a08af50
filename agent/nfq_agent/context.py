"""What a worker lends its elements: how they treat what began before, and memory that it shares with other workers."""

from __future__ import annotations

from dataclasses import dataclass, field

from nfq_agent.decisions import Decisions
from nfq_agent.flow_memory import FlowMemory
from nfq_agent.names import NameTable
from nfq_agent.owner import Owners
from nfq_agent.values import MidstreamMode


@dataclass(frozen=True, slots=True)
class Context:
    """midstream: for a connection whose beginning was not seen. flows: connections that were decided; None keeps none.

    names: which names DNS answers gave for addresses; None where no rule asks.
    owners: who a flow belongs to, for elements that ask (`PacketElement.reads_owner_of`).
    copies: the packets are copies. Two interfaces may show one twice, the second time late: its place in the connection says
    nothing, and no packet is dropped for it.
    monitor: what is denied passes, and is counted.
    decisions: where elements with rules count what their rules decide.
    """

    midstream: MidstreamMode = "accept"
    flows: FlowMemory | None = None
    names: NameTable | None = None
    owners: Owners = field(default_factory=Owners)
    copies: bool = False
    monitor: bool = False
    decisions: Decisions = field(default_factory=Decisions)
