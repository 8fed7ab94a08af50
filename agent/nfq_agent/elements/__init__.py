"""The table of built-in elements, and how any element is found by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nfq_agent.elements.loading import CodeError, import_object

if TYPE_CHECKING:
    from pydantic import BaseModel

    from nfq_agent.element import PacketElement
    from nfq_agent.stream import StreamElement

# One line for each: the name in the configuration, and where its class is.
PACKET_ELEMENTS: Final = {
    "dns-answer": "nfq_agent.elements.dns_answer:AnswerChanger",
    "dpi": "nfq_agent.elements.dpi:Dpi",
    "log": "nfq_agent.elements.log:FiveTupleLog",
    "chaos": "nfq_agent.elements.chaos:Chaos",
    "offload": "nfq_agent.elements.offload:Offload",
    "pcap": "nfq_agent.elements.pcap:Pcap",
    "policy": "nfq_agent.elements.policy:Policy",
    "rate-limit": "nfq_agent.elements.rate_limit:RateLimit",
    "record": "nfq_agent.elements.record:FlowRecord",
    "refuse-mptcp": "nfq_agent.elements.refuse_mptcp:RefuseMptcp",
    "sample": "nfq_agent.elements.sample:Sample",
    "syn-monitor": "nfq_agent.elements.syn_monitor:SynMonitor",
}
STREAM_ELEMENTS: Final = {
    "stream-log": "nfq_agent.elements.stream_log:StreamLog",
    "replace": "nfq_agent.elements.replace:Replace",
    "limit": "nfq_agent.elements.limit:Limit",
    "delay": "nfq_agent.elements.delay:Delay",
    "http-host": "nfq_agent.elements.http_host:HttpHost",
    "sni": "nfq_agent.elements.sni:ServerName",
    "tap": "nfq_agent.elements.tap:Tap",
    "timeout": "nfq_agent.elements.timeout:Timeout",
    "slow-close": "nfq_agent.elements.slow_close:SlowClose",
    "limit-bytes": "nfq_agent.elements.limit_bytes:LimitBytes",
    "reset-after": "nfq_agent.elements.reset_after:ResetAfter",
    "slicer": "nfq_agent.elements.slicer:Slicer",
}

GROUP: Final = "nfq_agent.elements"


class ElementError(Exception):
    """An element that cannot be loaded. name: as the configuration has it. reason: text, or the options' ValidationError.

    options: the model that its options do not fit.
    """

    def __init__(self, name: str, reason: object, options: type[BaseModel] | None = None) -> None:
        super().__init__(f"element {name}: {reason}")
        self.options = options
        self.name = name
        self.reason = reason


def packet_element(kind: str) -> type[PacketElement]:
    """The class of a packet element: a built-in, an entry point of the group, or `package.module:Class`."""
    from nfq_agent.element import PacketElement

    cls = _find(kind, PACKET_ELEMENTS)
    if not (isinstance(cls, type) and issubclass(cls, PacketElement)):
        raise ElementError(kind, f"{kind!r} is not a packet element; allowed: a subclass of nfq_agent.PacketElement")
    return cls


def stream_element(kind: str) -> type[StreamElement]:
    """The class of a stream element, found in the same way."""
    from nfq_agent.stream import StreamElement

    cls = _find(kind, STREAM_ELEMENTS)
    if not (isinstance(cls, type) and issubclass(cls, StreamElement)):
        raise ElementError(kind, f"{kind!r} is not a stream element; allowed: a subclass of nfq_agent.StreamElement")
    return cls


def _find(kind: str, builtins: dict[str, str]) -> object:
    path = builtins.get(kind)
    if path is None and ":" in kind:
        path = kind
    if path is None:
        from importlib.metadata import entry_points

        path = next((point.value for point in entry_points(group=GROUP, name=kind)), None)
    if path is None:
        import difflib

        near = difflib.get_close_matches(kind, builtins, 1, 0.5)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        names = ", ".join(sorted(builtins)) or "none is built in"
        raise ElementError(
            kind, f"unknown element {kind!r}{hint}; allowed: {names}, an [element.NAME] table, or package.module:Class"
        )
    try:
        return import_object(path)
    except CodeError as error:
        raise ElementError(kind, str(error)) from error
