"""What another worker knows of a TCP connection that a policy judged: what it said, and that a message has begun. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from nfq_agent.context import Context
from nfq_agent.flow import Flow
from nfq_agent.flow_memory import FlowMemory
from nfq_agent.packet import TCP, Packet
from nfq_agent.policy_rule import DST_NAME

# The conflict of a connection of which another worker sees the second half of a message alone.
UNFINISHED: Final = "a message of which a worker before saw the beginning alone"


def keep(memory: FlowMemory | None, flow: Flow, facts: Mapping[str, Any]) -> None:
    """Keep what a connection said. memory: None keeps nothing."""
    if memory is not None and flow.origin.protocol == TCP and not flow.midstream:
        memory.keep(flow.origin, facts, flow.answered, flow.last)


def keep_unfinished(memory: FlowMemory | None, packet: Packet, flow: Flow) -> bool:
    """Keep that a message has begun to pass, if the packet is the client's. A worker that sees only the rest of it cannot know
    its name. Returns whether it is kept.
    """
    if memory is None or (packet.headers.five_tuple == flow.origin) != flow.origin_is_client:
        return False
    keep(memory, flow, begun(flow.facts))
    return True


def begun(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a connection with a message of which the beginning has passed. facts: those that are known."""
    known = {name: facts[name] for name in ("protocol", DST_NAME) if name in facts}
    return {**known, "dpi": "gave-up", "conflict": UNFINISHED}


def name_destination(context: Context, flow: Flow) -> None:
    """Put the names of the destination into the flow, as they are known when it begins."""
    if DST_NAME in flow.facts:
        return
    names = () if context.names is None else context.names.names(flow.origin.dst, flow.last)
    if not names and context.flows is not None and "dpi" not in flow.facts and flow.origin.protocol == TCP:
        known = context.flows.recall(flow.origin)
        names = () if known is None else known[1].get(DST_NAME, ())
    if names or not flow.midstream:
        flow.facts[DST_NAME] = names
