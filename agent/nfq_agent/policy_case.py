"""A policy's view of one flow, and the text of a changed verdict. Values only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from nfq_agent.flow import Exchange, Flow, Opening
from nfq_agent.packet import FiveTuple, Packet
from nfq_agent.policy_rule import ActionName, PolicyRule

_SYN: Final = 2
# FIN, SYN, RST and ACK.
_OPENING: Final = 0x17


@dataclass(slots=True)
class PolicyCase:
    """The rules that its first packet meets, and how far the message at hand has come.

    message: its number. packets, size: with payload, and their bytes, while it was open. known: the facts that the outcome
    follows from. open: those with which it was open the last time. kept: other workers know that the message has begun.
    denied: a message of a TCP connection was denied. What comes later cannot arrive without it, and what is sent again must not
    arrive, so that is final. hooks: where packets of each direction come first, where an owner decides.
    """

    candidates: tuple[PolicyRule, ...]
    message: int = 0
    packets: int = 0
    size: int = 0
    known: tuple[Any, ...] | None = None
    open: tuple[Any, ...] | None = None
    kept: bool = False
    action: ActionName | None = None
    label: str = ""
    decided: bool = False
    denied: bool = False
    hooks: dict[FiveTuple, int] = field(default_factory=dict)


def begins_again(packet: Packet, flow: Flow, case: PolicyCase, stays: bool) -> bool:
    """Whether a packet may be of another owner than the flow, whose ends another socket may have now.

    That is the first packet of a connection; and each packet of a flow that is denied: no packet of it has passed, so that
    connection tracking has no such flow either. Not in a later hook, which the packet comes to from the first. stays: packets of
    what is denied have passed, before a fact was known or in monitor mode, so that it stays so, and no server begins again.
    """
    headers = packet.headers
    five_tuple = headers.five_tuple
    if case.hooks.setdefault(five_tuple, packet.hook) != packet.hook or (stays and five_tuple != flow.origin):
        return False
    if headers.tcp_flags is not None and headers.tcp_flags & _OPENING == _SYN:
        return True
    return not stays and case.action in ("drop", "reject")


def renewed(case: PolicyCase, candidates: tuple[PolicyRule, ...]) -> PolicyCase:
    """A new case, where other rules are met now."""
    return case if candidates == case.candidates else PolicyCase(candidates, hooks=case.hooks)


def taken_over(opening: Opening | Exchange, candidates: tuple[PolicyRule, ...], keeps: bool) -> PolicyCase:
    """That of a flow which no element was shown. keeps: other workers know that its message has begun."""
    if isinstance(opening, Exchange):
        return PolicyCase(candidates, packets=opening.packets, size=opening.size)
    if opening.name:
        return PolicyCase(candidates, packets=1)
    return PolicyCase(candidates, packets=opening.pieces, size=len(opening.piece), kept=keeps)


def turned(before: tuple[ActionName | None, str], case: PolicyCase, facts: tuple[str, ...]) -> str:
    """What a flow got before, what it gets from now on, and by what was seen. facts: the names of what is `known`."""
    assert case.known is not None
    found = ", ".join(
        f"{fact} {value}" for fact, value in zip(facts, case.known, strict=True) if value is not None and fact != "dpi"
    )
    return (
        f"{before[0] or 'no verdict'} by {before[1]} before, {case.action or 'no verdict'} by {case.label} from now on; "
        f"seen: {found or 'nothing'}"
    )
