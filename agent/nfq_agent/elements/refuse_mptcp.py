"""`refuse-mptcp`: takes the MPTCP option out of connection requests, so that both ends speak plain TCP. It judges nothing.

Over MPTCP a request may be split over several connections, of which each shows a part. Without the option in the SYN the client
falls back to TCP at once (RFC 8684 3.7), and a further subflow is reset by its own client.
"""

from __future__ import annotations

from nfq_agent.element import Needs, PacketElement
from nfq_agent.flow import Flow, Watch
from nfq_agent.packet import TCP, Headers, Packet, PacketError
from nfq_agent.soundness import MPTCP, tcp_options
from nfq_agent.verdict import Action, Verdict

_SYN = 2


class RefuseMptcp(PacketElement):
    """Lets what the elements decide stand, and puts NOPs in place of the option in a SYN that is accepted."""

    needs = Needs.PAYLOAD
    # A SYN is never offloaded, so that the queue may take other packets whole.
    rewrites_small = True
    lasting = True
    facts_read = ()

    def watches(self, flow: Flow) -> int:  # it is the same for all
        """Nothing: a SYN is always shown."""
        return Watch.NOTHING

    def amend(self, packet: Packet, flow: Flow | None, verdict: Verdict, lasting: bool) -> Verdict:
        """The verdict; with other bytes for an accepted SYN that has the option."""
        if verdict.action is not Action.ACCEPT or verdict.payload is not None:
            return verdict
        try:
            headers = packet.headers
        except PacketError:
            return verdict
        if headers.five_tuple.protocol != TCP or not (headers.tcp_flags or 0) & _SYN:
            return verdict
        if MPTCP not in tcp_options(packet, headers):
            return verdict
        return Verdict(Action.ACCEPT, verdict.mark, _without(packet.payload, headers))


def _without(payload: bytes, headers: Headers) -> bytes:
    """The packet with NOPs in place of every MPTCP option (RFC 9293 3.1). Its checksum is mended by the worker."""
    assert headers.transport is not None
    assert headers.data is not None
    changed = bytearray(payload)
    at = headers.transport + 20
    while at < headers.data and changed[at] != 0:
        size = 1 if changed[at] == 1 else changed[at + 1] if at + 1 < headers.data else 0
        if size < 1 or at + size > headers.data or (size == 1 and changed[at] != 1):
            break
        if changed[at] == MPTCP:
            changed[at : at + size] = b"\1" * size
        at += size
    return bytes(changed)
