"""nfq-agent: a host agent that takes traffic through netfilter, judges it, and leaves nothing behind."""

from nfq_agent.element import Needs, PacketElement
from nfq_agent.packet import FiveTuple, Hook, Packet, PacketError
from nfq_agent.queue import (
    Queue,
    QueueBusyError,
    QueueError,
    QueuePermissionError,
    QueueSettingError,
    QueueSettings,
    QueueStateError,
)
from nfq_agent.verdict import ACCEPT, DROP, REPEAT, RETAIN, Action, RewriteError, Verdict, VerdictError

__all__ = [
    "ACCEPT",
    "DROP",
    "REPEAT",
    "RETAIN",
    "Action",
    "FiveTuple",
    "Hook",
    "Needs",
    "Packet",
    "PacketElement",
    "PacketError",
    "Queue",
    "QueueBusyError",
    "QueueError",
    "QueuePermissionError",
    "QueueSettingError",
    "QueueSettings",
    "QueueStateError",
    "RewriteError",
    "Verdict",
    "VerdictError",
]
