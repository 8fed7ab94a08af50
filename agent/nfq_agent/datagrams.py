"""One UDP flow as `dpi` reads it: datagrams in, facts out. No I/O, no clock.

Every DNS message and every QUIC connection is a message of its own. A flow that was given up is still checked for both: a
client cannot hide them by sending something else first.
"""

from __future__ import annotations

from typing import Final

from nfq_agent.flow import Exchange
from nfq_agent.message_events import AHEAD, PACKETS, SECONDS, Event, Said
from nfq_agent.noise import looks_encrypted
from nfq_agent.protocols import Found, dns, quic, quic_keys
from nfq_agent.protocols.known import DATAGRAMS

# The first two bits of QUIC's packets before the handshake is over (RFC 8999 5.1).
LONG_HEADER: Final = 0xC0
_TOO_MANY: Final = f"{PACKETS} packets with payload, and it is not known"
_TOO_LATE: Final = f"{SECONDS:.0f} seconds have passed"


class Datagrams:
    """What is kept of a UDP flow. begun: a part of the message was told, or it is the first."""

    __slots__ = ("_began", "_client_first", "_conflict", "_hello", "_junk", "_quic", "begun", "decided", "gave_up")

    def __init__(self) -> None:
        self._began: float | None = None
        self._junk = 0
        self._quic: quic.Connections | None = None
        # The QUIC connection that the facts are of.
        self._hello: quic.Hello | None = None
        self._conflict = False
        # Whether the side that spoke first is QUIC's client; None while no hello has come.
        self._client_first: bool | None = None
        self.begun = True
        self.decided = False
        self.gave_up = False

    @classmethod
    def unshown(cls, exchange: Exchange) -> Datagrams:
        """The same as if its datagrams had been read."""
        made = cls()
        made.decided, made.gave_up = bool(exchange.protocol), exchange.gave_up
        made.begun = not (made.decided or made.gave_up)
        if not made.decided:
            made._junk, made._began = exchange.packets, exchange.began
        return made

    @property
    def stopped(self) -> str:
        """Why a flow that showed nothing was given up."""
        return _TOO_MANY if self._junk >= PACKETS else _TOO_LATE

    @property
    def keeps(self) -> bool:
        """Whether bytes are kept."""
        return self._hello is not None and not self._hello.complete

    @property
    def unfinished(self) -> bool:
        """Whether a message has begun that is not complete."""
        return self.keeps

    def forget(self) -> None:
        """Drop the bytes that are kept."""
        if self._hello is not None:
            self._hello.give_up()

    def run_out(self, reason: str) -> list[Said]:
        """Stop waiting for the rest of a message. A hello that has begun hides a name: that is a conflict."""
        conflict = self.keeps
        self.forget()
        self.gave_up = True
        return [Said(Event.GAVE_UP, {}, reason, conflict)]

    def take(self, data: bytes, from_origin: bool, is_dns: bool, now: float) -> list[Said]:
        """A datagram.

        from_origin: of the side that spoke first. is_dns: the port or a fact shows that it is DNS. now: seconds.
        """
        if is_dns or not self.decided:
            result = dns.datagram(data, is_dns)
            if isinstance(result, Found):
                return self._message(result)
            if is_dns and from_origin and self.decided:
                # A datagram that cannot be read does not inherit the facts of the last one.
                return [Said(Event.GAVE_UP, {}, "a datagram that is not a DNS message")]
        is_client = self._client_first is None or self._client_first == from_origin
        if is_client and data[0] & LONG_HEADER == LONG_HEADER and (said := self._initial(data, from_origin, now)) is not None:
            return said
        if self.decided or self.gave_up or (self._hello is not None and from_origin):
            return []
        for parser in DATAGRAMS:
            result = parser(data)
            if isinstance(result, Found):
                return self._message(result)
        return self._counted(data, now)

    def _message(self, found: Found) -> list[Said]:
        self.decided = True
        return [Said(Event.MESSAGE, found.facts)]

    def _initial(self, data: bytes, from_origin: bool, now: float) -> list[Said] | None:
        """What a client's Initial packets show; None if they are not QUIC.

        The side that spoke first need not be the client: a server may still send something of an earlier connection.
        """
        if self._quic is None:
            if quic.long_header(data) is None:
                return None
            self._quic = quic.Connections()
        hellos = self._quic.add(data, now)
        if not hellos:
            return self._without_initial(data) if from_origin else None
        self._client_first = from_origin
        if not quic_keys.AVAILABLE:
            self._hello = hellos[-1]
            self.gave_up = True
            return [Said(Event.PART, self._hello.facts), Said(Event.GAVE_UP, {}, quic.NO_CRYPTOGRAPHY)]
        return [said for hello in hellos for said in self._told(hello)]

    def _without_initial(self, data: bytes) -> list[Said]:
        """A packet with a long header that is not an Initial packet of a connection that can be read."""
        if self._hello is not None and not self._hello.complete:
            # 0-RTT: nothing can be done with it before the hello is whole, and the client sends it again.
            return AHEAD
        version = quic.long_header(data)
        if version is None or self._hello is not None or quic.readable(version):
            # A packet of a connection that is known, or one that only comes with its Initial.
            return []
        return self._message(Found({"protocol": "quic", "quic_version": version}))

    def _told(self, hello: quic.Hello) -> list[Said]:
        """What a connection shows now."""
        same, self._hello = hello is self._hello, hello
        if not hello.complete:
            # A part of another connection begins another message; one of the same connection continues it.
            if not same:
                self.begun = self.begun and not self.decided
            return [Said(Event.PART, hello.facts)]
        if same and not self.begun and hello.conflict == self._conflict:
            # A retransmission.
            return []
        self._conflict = hello.conflict
        return self._message(Found(hello.facts))

    def _counted(self, data: bytes, now: float) -> list[Said]:
        """Count a datagram that shows nothing."""
        if self._began is None:
            self._began = now
        self._junk += 1
        if self._junk == 1 and looks_encrypted(data):
            return [Said(Event.PART, {"encrypted": True})]
        if self._junk >= PACKETS:
            return self.run_out(_TOO_MANY)
        return self.run_out(_TOO_LATE) if now - self._began > SECONDS else []
