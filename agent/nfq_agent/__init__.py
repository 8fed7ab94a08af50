"""nfq-agent: a host agent that intercepts traffic through netfilter and judges it. What programs and elements may use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nfq_agent.checksum import mend
    from nfq_agent.element import Needs, PacketElement
    from nfq_agent.flow import Flow, Watch
    from nfq_agent.host.nfqueue.channel import open_socket
    from nfq_agent.options import Options
    from nfq_agent.packet import FiveTuple, Hook, Packet, PacketError, address, endpoint
    from nfq_agent.queue.errors import QueueBusyError, QueueError, QueuePermissionError, QueueSettingError, QueueStateError
    from nfq_agent.queue.queue import Queue
    from nfq_agent.queue.settings import QueueSettings
    from nfq_agent.stream import CLOSE, Connection, Done, Later, Part, StreamElement, Way
    from nfq_agent.values import Duration
    from nfq_agent.verdict import ACCEPT, DROP, REPEAT, RETAIN, Action, RewriteError, Verdict, VerdictError
    from nfq_agent.version import __version__
else:
    # Loaded on first use: a program with a queue needs no pydantic, and shell completion needs nothing of this.
    _MODULES = {
        "checksum": ("mend",),
        "element": ("Needs", "PacketElement"),
        "flow": ("Flow", "Watch"),
        "host.nfqueue.channel": ("open_socket",),
        "options": ("Options",),
        "packet": ("FiveTuple", "Hook", "Packet", "PacketError", "address", "endpoint"),
        "queue.errors": ("QueueBusyError", "QueueError", "QueuePermissionError", "QueueSettingError", "QueueStateError"),
        "queue.queue": ("Queue",),
        "queue.settings": ("QueueSettings",),
        "stream": ("CLOSE", "Connection", "Done", "Later", "Part", "StreamElement", "Way"),
        "values": ("Duration",),
        "verdict": ("ACCEPT", "DROP", "REPEAT", "RETAIN", "Action", "RewriteError", "Verdict", "VerdictError"),
        "version": ("__version__",),
    }
    _LATER = {name: f"nfq_agent.{module}" for module, names in _MODULES.items() for name in names}

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
    "Watch",
    "Way",
    "__version__",
    "address",
    "endpoint",
    "mend",
    "open_socket",
]
