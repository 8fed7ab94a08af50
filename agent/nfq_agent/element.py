"""Elements: small pieces that look at a packet or at a stream and may answer; and the chain that asks them in order.

An element knows no neighbour, reads no clock and does no I/O of its own: what it wants said goes through `emit`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from nfq_agent.flow import Flow
from nfq_agent.packet import Packet
from nfq_agent.verdict import Verdict

Emit = Callable[..., None]


class Needs(IntEnum):
    """How much of a packet an element reads; copy range and decoding follow from the most that a chain asks for."""

    METADATA = 0
    HEADERS = 1
    PAYLOAD = 2
    FLOW = 3


class Options(BaseModel):
    """The keys of an element's table in the configuration. An element adds its own in a subclass."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class PacketElement:
    """Base of every element that judges packets.

    `needs` says how much of the packet it reads, `rewrites` that it may answer with a changed payload. `Options` is the
    model of its table. `emit(message, **fields)` says one event; it never blocks and may hold back what comes too fast.
    """

    needs: ClassVar[Needs] = Needs.HEADERS
    rewrites: ClassVar[bool] = False
    Options: ClassVar[type[Options]] = Options

    def __init__(self, name: str, options: Any, emit: Emit) -> None:
        self.name = name
        self.options = options
        self.emit = emit

    def start(self) -> None:
        """Called once in the worker, before the first packet."""

    def stop(self) -> None:
        """Called once in the worker, after the last packet."""

    def decide(self, packet: Packet, flow: Flow | None) -> Verdict | None:
        """The verdict on this packet, or None to leave it to the elements behind. `flow` is None unless needs is FLOW."""
        raise NotImplementedError

    def judged(self, packet: Packet, verdict: Verdict) -> None:
        """Called with what became of a packet that this element saw, after the verdict was given."""


class ElementChain:
    """Elements in their order. The first that answers wins."""

    def __init__(self, elements: Sequence[PacketElement], default: Verdict) -> None:
        self._elements = tuple(elements)
        self._deciders = tuple(element.decide for element in self._elements)
        # Only those that override it are told; a call that does nothing costs as much as one that does.
        self._listeners = tuple(e.judged for e in self._elements if type(e).judged is not PacketElement.judged)
        self._default = default

    def __len__(self) -> int:
        return len(self._elements)

    @property
    def needs(self) -> Needs:
        """The most that any element reads."""
        return max((element.needs for element in self._elements), default=Needs.METADATA)

    def decide(self, packet: Packet, flow: Flow | None) -> Verdict:
        """The first answer, else the default. Whatever an element raises goes to the caller."""
        for decide in self._deciders:
            verdict = decide(packet, flow)
            if verdict is not None:
                return verdict
        return self._default

    def judged(self, packet: Packet, verdict: Verdict) -> None:
        """Tell the elements that want to know what became of the packet."""
        for listener in self._listeners:
            listener(packet, verdict)

    def start(self) -> None:
        """Start the elements in order."""
        for element in self._elements:
            element.start()

    def stop(self) -> None:
        """Stop them in reverse order."""
        for element in reversed(self._elements):
            element.stop()
