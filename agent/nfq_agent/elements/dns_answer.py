"""`dns-answer`: changes or empties the answers of DNS for some names (a sinkhole)."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BeforeValidator, Field

from nfq_agent import element
from nfq_agent.dns_reply import rewritten
from nfq_agent.element import Emit, Needs, PacketElement
from nfq_agent.flow import Flow
from nfq_agent.packet import TCP, UDP, Packet
from nfq_agent.patterns import Patterns
from nfq_agent.protocols import dns
from nfq_agent.values import AddressField, listed
from nfq_agent.verdict import Action, Verdict

_PORT: Final = 53
_RCODES: Final = {"empty": 0, "nxdomain": 3}


class AnswerChangerOptions(element.Options):
    """names: patterns of the names asked for. addresses: what is answered instead, by the type that was asked for.

    answer: without an address of that type: "empty" (the name exists, without such a record) or "nxdomain" (it does not).
    """

    names: Annotated[tuple[str, ...], BeforeValidator(listed(str)), Field(min_length=1, strict=False)]
    addresses: Annotated[tuple[AddressField, ...], Field(strict=False)] = ()
    answer: Literal["empty", "nxdomain"] = "empty"


class AnswerChanger(PacketElement[AnswerChangerOptions]):
    """Lets what the elements decide stand, and rewrites an accepted answer from port 53 whose question names such a name.

    Over TCP the answer keeps its length, so that the sequence numbers stay right. One that begins in a segment and is not
    whole in it is dropped, so that none passes unchanged.
    """

    needs = Needs.PAYLOAD
    rewrites = True

    def __init__(self, name: str, options: AnswerChangerOptions, emit: Emit) -> None:
        super().__init__(name, options, emit)
        self._names = Patterns(options.names, caseless=True)
        self._addresses = tuple(address.packed for address in options.addresses)
        self._rcode = _RCODES[options.answer]

    def amend(self, packet: Packet, flow: Flow | None, verdict: Verdict, lasting: bool) -> Verdict:
        """The verdict; with other bytes for an accepted answer."""
        if verdict.action is not Action.ACCEPT or verdict.payload is not None:
            return verdict
        headers = packet.headers
        protocol, sport = headers.five_tuple.protocol, headers.five_tuple.sport
        if sport != _PORT or protocol not in (TCP, UDP) or headers.data is None or headers.fragment:
            return verdict
        data = packet.data
        changed = self._changed(data, keep_size=False) if protocol == UDP else self._changed_segment(data)
        if changed is None:
            return verdict
        if not changed:
            return Verdict(Action.DROP)
        return Verdict(Action.ACCEPT, verdict.mark, packet.payload[: headers.data] + changed)

    def _changed(self, message: bytes, keep_size: bool) -> bytes | None:
        """The other answer; None where the name is not one of ours, empty where it cannot be made."""
        if len(message) < 17 or not message[2] & 0x80:
            return None
        asked = dns.name(message, 12, strict=False)
        if asked is None or not self._names.match(asked[0]):
            return None
        rcode = 0 if self._addresses else self._rcode
        return rewritten(message, self._addresses, rcode, len(message) if keep_size else None) or b""

    def _changed_segment(self, data: bytes) -> bytes | None:
        """The same for the messages with which a segment begins, each behind its length (RFC 7766 8)."""
        made, changes = b"", False
        at = 0
        while len(data) >= at + 2:
            end = at + 2 + int.from_bytes(data[at : at + 2], "big")
            changed = self._changed(data[at + 2 : end], keep_size=True)
            if changed is not None and (not changed or end > len(data)):
                return b""
            made += data[at : at + 2] + (data[at + 2 : end] if changed is None else changed)
            changes = changes or changed is not None
            at = end
        return made + data[at:] if changes else None
