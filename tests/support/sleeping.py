"""An element that takes its time, for tests: `sleeping:Sleeper`."""

from __future__ import annotations

import time

from nfq_agent import element
from nfq_agent.element import PacketElement
from nfq_agent.flow import Flow
from nfq_agent.packet import Packet
from nfq_agent.verdict import Verdict


class SleeperOptions(element.Options):
    """seconds: for each packet."""

    seconds: float


class Sleeper(PacketElement):
    """Sleeps for each packet."""

    Options = SleeperOptions

    def decide(self, packet: Packet, flow: Flow | None) -> Verdict | None:
        """Leave it to the others, later."""
        time.sleep(self.options.seconds)
        return None
