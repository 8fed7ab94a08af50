"""Flows whose first packets were not shown, since the answer to them was known. No I/O, no clock."""

from __future__ import annotations

import json
from typing import Any, Final

from nfq_agent.conversation import Conversation, Phase
from nfq_agent.earlier import Earlier
from nfq_agent.flow import NAME_FACTS, Asked, Exchange, Opening
from nfq_agent.message_events import Event
from nfq_agent.protocols import Found, http1, tls
from nfq_agent.protocols.known import PARSERS

# What a ClientHello says besides its name, from which an answer may follow.
DETAILS: Final = ("tls_version", "ech", "tls_alpn", "ja3", "ja4")


class Unshown(Conversation):
    """A TCP connection, the same as if its packets had been shown.

    facts: of its first message, as far as they are known.
    """

    __slots__ = ("facts",)

    def __init__(self, opening: Opening, now: float) -> None:
        """now: seconds, of the packet that is shown."""
        earlier = None if opening.earlier is None else Earlier((), opening.initial).and_then(*opening.earlier, opening.initial)
        super().__init__(opening.initial, True, PARSERS, earlier)
        self.facts = facts_so_far(opening)
        self.answered = opening.server_first is not None
        self.server_first = opening.server_first
        if opening.protocol:
            # A part of the first message was told, or all of it.
            self.begun = not opening.name
            if not opening.first or not opening.piece:
                self._phase = Phase.DONE if opening.done else Phase.LATER
                self._parsers = (http1.parse if opening.protocol == "http" else tls.after_hello,)
                self._next = opening.next
            if opening.piece:
                for said in self.client(opening.next, opening.piece, now if opening.name else opening.began):
                    if said.event is Event.MESSAGE:
                        self.facts |= said.facts
            if not opening.name:
                self._packets = opening.pieces
        self.closed, self.ended = opening.closed, opening.ended
        for side, stamp in ((True, opening.client_stamp), (False, opening.stamp)):
            if stamp is not None:
                self.soundness(side).stamp = stamp


def facts_of(asked: str, name: str, details: bytes = b"") -> dict[str, Any]:
    """The facts of an opening from which an answer may follow.

    asked: see Asked. name: empty for the beginning of a ClientHello. details: see `details_of`.
    """
    protocol = asked.partition(" ")[0]
    if not name:
        facts: dict[str, Any] = {"dpi": "gave-up" if asked == Asked.GAVE_UP else "undecided"}
        return facts | ({"protocol": protocol} if protocol in NAME_FACTS else {})
    # A message of DNS may ask for several names.
    facts = {"dpi": "decided", "protocol": protocol, NAME_FACTS[protocol]: (name,) if protocol == "dns" else name}
    if details:
        facts |= {fact: tuple(value) if isinstance(value, list) else value for fact, value in json.loads(details).items()}
    return facts


def facts_so_far(opening: Opening | Exchange) -> dict[str, Any]:
    """Those of a flow that no element was shown, as far as an answer may follow from them."""
    if isinstance(opening, Exchange):
        return facts_of(Asked.GAVE_UP if opening.gave_up else opening.protocol, opening.name)
    return facts_of(opening.protocol, opening.name, opening.details)


def details_of(hello: bytes) -> bytes:
    """What a ClientHello in the plain form says besides its name, as text."""
    found = tls.parse(hello, b"")
    assert isinstance(found, Found)
    details = {fact: found.facts[fact] for fact in DETAILS if fact in found.facts}
    return json.dumps(details, separators=(",", ":")).encode()
