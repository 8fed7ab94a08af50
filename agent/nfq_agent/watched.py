"""Which packets of a flow may still tell `dpi` something. No I/O, no clock."""

from __future__ import annotations

from nfq_agent.conversation import Conversation
from nfq_agent.datagrams import Datagrams
from nfq_agent.flow import Flow, Watch
from nfq_agent.protocols import dns


def of_conversation(connection: Conversation, flow: Flow) -> int:
    """Those of a TCP connection; tells the flow what it expects of the server."""
    if (connection.renewed is not None and not connection.answered) or (connection.mptcp and connection.listens):
        # The client may go on from its later SYN with any packet; any may have an option of MPTCP.
        return Watch.ALL
    watch: int = Watch.NOTHING
    if connection.listens or connection.compares or connection.earlier is not None:
        watch = Watch.CLIENT
    # What is expected is kept for one element alone.
    if connection.awaits_server or (connection.compares and flow.expects is not None):
        return watch | Watch.SERVER | Watch.SERVER_BARE
    if (expected := connection.expected()) is not None:
        flow.expects = expected
        watch |= Watch.ACKNOWLEDGEMENT
    return watch


def of_datagrams(datagrams: Datagrams, flow: Flow) -> int:
    """Those of a UDP flow."""
    if not dns.PORTS.isdisjoint((flow.origin.sport, flow.origin.dport)) or flow.facts.get("protocol") == "dns":
        return Watch.DATA
    if datagrams.decided:
        return Watch.QUIC
    return Watch.DNS | Watch.QUIC if datagrams.gave_up else Watch.DATA
