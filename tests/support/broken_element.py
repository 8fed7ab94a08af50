"""An element that raises before its worker serves."""

from __future__ import annotations

from nfq_agent import Packet, PacketElement, Verdict
from nfq_agent.flow import Flow


class Broken(PacketElement):
    def start(self) -> None:
        raise LookupError("on purpose")

    def decide(self, packet: Packet, flow: Flow | None) -> Verdict | None:
        return None
