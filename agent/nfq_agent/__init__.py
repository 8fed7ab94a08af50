"""nfq-agent: a host agent that takes traffic through netfilter, judges it, and leaves nothing behind."""

from nfq_agent.element import Needs, PacketElement
from nfq_agent.packet import FiveTuple, Packet, PacketError
from nfq_agent.verdict import ACCEPT, DROP, REPEAT, Action, Verdict

__all__ = [
    "ACCEPT",
    "DROP",
    "REPEAT",
    "Action",
    "FiveTuple",
    "Needs",
    "Packet",
    "PacketElement",
    "PacketError",
    "Verdict",
]
