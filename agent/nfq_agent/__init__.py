"""nfq-agent: a host agent that takes traffic through netfilter, judges it, and leaves nothing behind."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nfq_agent.packet import FiveTuple, Hook, Packet, PacketError
from nfq_agent.queue.queue import (
    Queue,
    QueueBusyError,
    QueueError,
    QueuePermissionError,
    QueueSettingError,
    QueueSettings,
    QueueStateError,
)
from nfq_agent.verdict import ACCEPT, DROP, REPEAT, RETAIN, Action, RewriteError, Verdict, VerdictError

if TYPE_CHECKING:
    from nfq_agent.element import Needs, PacketElement
    from nfq_agent.stream import CLOSE, Connection, Done, Later, Part, StreamElement, Way
else:
    # A program that only wants a queue is spared what elements need: pydantic makes most of the import's time and memory.
    _LATER = dict.fromkeys(("Needs", "PacketElement"), "nfq_agent.element") | dict.fromkeys(
        ("CLOSE", "Connection", "Done", "Later", "Part", "StreamElement", "Way"), "nfq_agent.stream"
    )

    def __getattr__(name: str) -> Any:
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value = getattr(import_module(_LATER[name]), name)
        return value


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
