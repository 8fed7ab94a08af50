"""TCP connections that the flow table forgot before their client said anything. No I/O, no clock.

A program can connect and wait until its connection is forgotten. It is not to be taken for one that began before the agent: such
a connection may say what it likes (`midstream`). So where it began is kept in the flow memory, and it continues as if it was
never forgotten.
"""

from __future__ import annotations

from typing import Any, Final

from nfq_agent.conversation import Conversation
from nfq_agent.flow import Flow, Opening
from nfq_agent.flow_memory import FlowMemory
from nfq_agent.midstream import Midstream
from nfq_agent.packet import TCP
from nfq_agent.policy_rule import DST_NAME
from nfq_agent.protocols import Parser

# At the end of a worker so many are kept at most.
LAPSED: Final = 4096
# What is kept: the numbers of the client's SYN and of the server's first byte, whether the SYN offered MPTCP, and who kept it.
_INITIAL: Final = "initial"
_SERVER: Final = "server_first"
_MPTCP: Final = "mptcp"
_ERA: Final = "era"


def keep_lapsed(memory: FlowMemory | None, lapsed: list[Flow]) -> None:
    """Keep where forgotten flows began, as far as nothing is known of what they said. lapsed: is emptied."""
    for flow in lapsed:
        if memory is None or flow.origin.protocol != TCP or (began := _beginning(flow)) is None:
            continue
        origin = flow.origin if flow.origin_is_client else flow.origin.reversed()
        # A message that has begun to pass is remembered as such.
        if memory.recall(origin) is None:
            named = {DST_NAME: flow.facts[DST_NAME]} if DST_NAME in flow.facts else {}
            facts = {"dpi": "undecided", **named, **began, _ERA: memory.era}
            memory.keep(origin, facts, began[_SERVER] is not None, flow.last)
    lapsed.clear()


def _beginning(flow: Flow) -> dict[str, Any] | None:
    """Where a connection began whose client has said nothing; None for another, and for one that is over."""
    opening = flow.opening
    if isinstance(opening, Opening):
        silent = not opening.protocol and not opening.closed
        return {_INITIAL: opening.initial, _SERVER: opening.server_first, _MPTCP: False} if silent else None
    connection = next((state for state in flow.state.values() if isinstance(state, Conversation)), None)
    if connection is None or isinstance(connection, Midstream) or connection.closed or not connection.unfinished:
        return None
    if connection.awaited != connection.initial + 1 & 0xFFFFFFFF:
        return None
    return {_INITIAL: connection.initial, _SERVER: connection.server_first, _MPTCP: connection.mptcp}


def lapsed_connection(
    flow: Flow, memory: FlowMemory | None, parsers: tuple[Parser, ...], sequence: int, acknowledged: int
) -> Conversation | None:
    """The connection of a flow that was forgotten before its client said anything; None if it was not.

    The flow gets what is known of it. parsers: for its first message. sequence, acknowledged: of the packet at hand.
    """
    known = None if memory is None else memory.recall(flow.origin)
    if memory is None or known is None or _INITIAL not in known[1]:
        return None
    origin, facts = known
    initial, server_first, mptcp, era = (facts.pop(name, None) for name in (_INITIAL, _SERVER, _MPTCP, _ERA))
    next_one = initial + 1 & 0xFFFFFFFF
    # A probe of the client has the number before (RFC 9293 3.8.4).
    if era != memory.era and next_one not in ((sequence, sequence + 1) if flow.origin == origin else (acknowledged,)):
        # Something was said while no agent ran.
        memory.forget(origin)
        return None
    flow.origin = origin
    flow.facts |= facts
    flow.undecided = True
    connection = Conversation(initial, True, parsers)
    connection.server_first, connection.answered, connection.mptcp = server_first, server_first is not None, mptcp
    for side in (True, False):
        # Whether its SYN had a signature is not known any more.
        connection.soundness(side).signed = True
    return connection
