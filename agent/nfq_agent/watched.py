"""Which packets of a flow may still tell `dpi` something. No I/O, no clock."""

from __future__ import annotations

import re
from typing import Final

from nfq_agent.conversation import Conversation
from nfq_agent.datagrams import Datagrams
from nfq_agent.flow import Flow, Requests, Watch
from nfq_agent.midstream import Midstream
from nfq_agent.protocols import dns, http1

# A host that a request can name in one form only.
_PLAIN: Final = re.compile(r"[a-z0-9_.-]{1,253}")


def of_conversation(connection: Conversation, flow: Flow, requests: bool) -> int:
    """Those of a TCP connection; tells the flow what it expects. requests: later requests need not be shown."""
    if (connection.renewed is not None and not connection.answered) or (connection.mptcp and connection.listens):
        # The client may continue from its later SYN with any packet; any may have an option of MPTCP.
        return Watch.ALL
    watch: int = Watch.NOTHING
    if connection.listens or connection.compares or connection.earlier is not None:
        watch = Watch.CLIENT
    # What is expected is kept for one element alone.
    if connection.awaits_server or (connection.compares and flow.expects is not None):
        return watch | Watch.SERVER | Watch.SERVER_BARE
    expected = _requests(connection, flow) if requests and flow.expects is None else None
    if connection.compares or expected is not None:
        flow.expects = connection.expected(expected)
        watch |= Watch.ACKNOWLEDGEMENT if connection.compares else 0
        watch |= Watch.REQUEST if expected is not None else 0
    return watch


def _requests(connection: Conversation, flow: Flow) -> Requests | None:
    """The requests that say no more than the one before, as far as that is known."""
    # A connection that is joined late is read differently.
    if isinstance(connection, Midstream) or flow.midstream or (number := connection.next_of(http1.parse)) is None:
        return None
    facts = flow.facts
    host = facts.get("http_host")
    if facts.get("dpi") != "decided" or facts.get("protocol") != "http" or "conflict" in facts or not isinstance(host, str):
        return None
    if _PLAIN.fullmatch(host) is None:
        return None
    return Requests(number, connection.soundness(True).stamp, host.encode())


def of_datagrams(datagrams: Datagrams, flow: Flow) -> int:
    """Those of a UDP flow."""
    if not dns.PORTS.isdisjoint((flow.origin.sport, flow.origin.dport)) or flow.facts.get("protocol") == "dns":
        return Watch.DATA
    if datagrams.decided:
        return Watch.QUIC
    return Watch.DNS | Watch.QUIC if datagrams.gave_up else Watch.DATA
