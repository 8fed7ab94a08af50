"""An element that fails, and what a worker logs about it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from nfq_agent.element import Needs, PacketElement
from nfq_agent.flow import Account, Flow
from nfq_agent.packet import Packet
from nfq_agent.verdict import Verdict


class Fails(PacketElement):
    """Raises on a packet that says so, at the end of each flow, and at its own end."""

    needs = Needs.FLOW

    def decide(self, packet: Packet, flow: Flow | None) -> Verdict | None:
        if packet.data == b"fail":
            raise LookupError("packet")
        return None

    def follow(self, packet: Packet, flow: Flow, verdict: Verdict, account: Callable[[Flow], Account | None]) -> None:
        """Others than this one keep records."""

    def forgotten(self, flow: Flow, account: Account, stopped: bool) -> None:
        raise LookupError("flow")

    def tick(self, now: float, account: Callable[[Flow], Account | None]) -> None:
        raise LookupError("time")

    def stop(self) -> None:
        raise LookupError("stop")


class Said:
    """What was logged."""

    def __init__(self) -> None:
        self.lines: list[SimpleNamespace] = []

    def __call__(self, message: str, level: str = "info", **fields: Any) -> None:
        self.lines.append(SimpleNamespace(text=message, level=level, **fields))

    def where(self, **fields: Any) -> list[SimpleNamespace]:
        return [line for line in self.lines if fields.items() <= vars(line).items()]
