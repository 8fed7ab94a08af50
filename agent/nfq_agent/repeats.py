"""A bound on REPEAT: a packet that comes back unchanged again and again would loop without end. Reads no clock."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from nfq_agent.packet import Packet

# The kernel sends a packet with NF_REPEAT through the whole hook again (nf_reinject, net/netfilter/nf_queue.c). A mark that
# lets it
# pass takes one round. The bound is far above one, so that identical datagrams that wait together are not taken for a loop.
MOST: Final = 16
# A loop takes some 50 microseconds a round, so it reaches the bound within this; equal packets that arrive later are new ones.
_WITHIN: Final = 1.0
_REMEMBERED: Final = 1024


class RepeatBound:
    """Counts how often a packet was sent through the same hook again, by its bytes, which may change. Bounded in memory."""

    def __init__(self) -> None:
        self._seen: OrderedDict[tuple[int, bytes], tuple[float, int]] = OrderedDict()

    def allows(self, packet: Packet, now: float, payload: bytes | None = None) -> bool:
        """Whether the packet may be repeated once more. now: monotonic seconds. payload: its new bytes, None if they stay."""
        since, count = self._seen.pop((packet.hook, packet.payload), (now, 0))
        if now - since > _WITHIN:
            since, count = now, 0
        allowed = count < MOST
        # It comes back as it is sent.
        self._seen[packet.hook, payload if allowed and payload is not None else packet.payload] = since, count + allowed
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        return allowed
