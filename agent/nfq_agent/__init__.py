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
from nfq_agent.stream import CLOSE, Connection, Done, Later, Part, StreamElement, Way
from nfq_agent.verdict import ACCEPT, DROP, REPEAT, RETAIN, Action, RewriteError, Verdict, VerdictError

__all__ = [
    "ACCEPT",
    "CLOSE",
    "DROP",
    "REPEAT",
    "RETAIN",
    "Action",
    "Connection",
    "Done",
    "FiveTuple",
    "Hook",
    "Later",
    "Needs",
    "Packet",
    "PacketElement",
    "PacketError",
    "Part",
    "Queue",
    "QueueBusyError",
    "QueueError",
    "QueuePermissionError",
    "QueueSettingError",
    "QueueSettings",
    "QueueStateError",
    "RewriteError",
    "StreamElement",
    "Verdict",
    "VerdictError",
    "Way",
]
