"""nfq-agent: a host agent that intercepts traffic through netfilter and judges it. What programs and elements may use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nfq_agent.checksum import mend
from nfq_agent.flow import Flow
from nfq_agent.host.nfqueue.channel import open_socket
from nfq_agent.packet import FiveTuple, Hook, Packet, PacketError, address, endpoint
from nfq_agent.queue.errors import QueueBusyError, QueueError, QueuePermissionError, QueueSettingError, QueueStateError
from nfq_agent.queue.queue import Queue
from nfq_agent.queue.settings import QueueSettings
from nfq_agent.verdict import ACCEPT, DROP, REPEAT, RETAIN, Action, RewriteError, Verdict, VerdictError

if TYPE_CHECKING:
    from nfq_agent.element import Needs, Options, PacketElement
    from nfq_agent.stream import CLOSE, Connection, Done, Later, Part, StreamElement, Way
    from nfq_agent.values import Duration
else:
    # A program that only uses a queue does not load what elements need: pydantic takes most of the import's time and memory.
    _LATER = {
        **dict.fromkeys(("Needs", "Options", "PacketElement"), "nfq_agent.element"),
        **dict.fromkeys(("CLOSE", "Connection", "Done", "Later", "Part", "StreamElement", "Way"), "nfq_agent.stream"),
        "Duration": "nfq_agent.values",
    }

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
    "Duration",
    "FiveTuple",
    "Flow",
    "Hook",
    "Later",
    "Needs",
    "Options",
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
    "address",
    "endpoint",
    "mend",
    "open_socket",
]
