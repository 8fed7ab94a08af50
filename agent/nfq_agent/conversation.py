"""One TCP connection as `dpi` reads it: segments in, facts out. No I/O, no clock.

The client's bytes are a sequence of messages. The first is the opening, which shows the protocol; that may take bytes of both
sides. Each later message begins where the previous one ends, its body included, and is read by the parser that the previous
one named (`Found.then`). A message that cannot be read ends the reading: nothing that arrives later counts as read.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from nfq_agent.earlier import Belongs, Earlier
from nfq_agent.flow import Expected, Heard, Requests
from nfq_agent.message_events import AHEAD, BYTES, PACKETS, SECONDS, Event, Said
from nfq_agent.noise import looks_encrypted
from nfq_agent.protocols import WAIT, Found, Parser, parse_first
from nfq_agent.protocols.known import lookout_behind
from nfq_agent.protocols.starttls import is_search, lookout
from nfq_agent.read_bytes import ReadBytes, distance
from nfq_agent.reassembly import Reassembly
from nfq_agent.soundness import Soundness

# Messages and parts of bodies in one packet.
_STEPS: Final = 256


class Phase(Enum):
    """What is read next of the client: the opening, a later message, nothing more."""

    OPENING = 0
    LATER = 1
    DONE = 2


class Conversation:
    """What is kept of a TCP connection.

    initial: the client's initial sequence number. from_origin: True where the client sent the flow's first packet. answered:
    a packet of the server was seen. closed: a FIN or RST was seen. renewed: the number of a later SYN, until the server has
    answered it. server_first: the number of the server's first byte, where its SYN was seen. begun: a part of the message was
    reported, or it is the first. ended: a FIN of the client was seen. earlier: connections before this one, as long as no
    server has answered it. mptcp: the SYN offered MPTCP.
    """

    __slots__ = (
        "_began", "_client", "_first", "_needs", "_next", "_packets", "_parsers", "_phase", "_read_bytes", "_server",
        "_soundness", "answered", "begun", "closed", "earlier", "ended", "from_origin", "initial", "mptcp", "renewed",
        "server_first",
    )  # fmt: skip

    def __init__(self, initial: int, from_origin: bool, parsers: tuple[Parser, ...], earlier: Earlier | None = None) -> None:
        self.initial = initial
        self.earlier = earlier
        # For the server's segments and for the client's; made when needed.
        self._soundness: tuple[Soundness, Soundness] | None = None
        self.from_origin = from_origin
        self.answered = False
        self.begun = True
        self.mptcp = False
        self.closed = False
        self.ended = False
        self.renewed: int | None = None
        self.server_first: int | None = None
        self._phase = Phase.OPENING
        self._parsers = parsers
        # Where the next message begins.
        self._next = initial + 1 & 0xFFFFFFFF
        # What was read and not acknowledged yet.
        self._read_bytes: ReadBytes | None = None
        self._began: float | None = None
        self._packets = 0
        self._needs = 0
        self._client: Reassembly | None = None
        self._server: Reassembly | None = None
        # The opening and its parser, while the server may still add something to it.
        self._first: tuple[Parser, bytes] | None = None

    @property
    def keeps(self) -> bool:
        """Whether bytes are kept."""
        return self._client is not None or self._server is not None or self._first is not None

    @property
    def held(self) -> int:
        """Bytes kept now, both ways."""
        client = 0 if self._client is None else self._client.held
        return client if self._server is None else client + self._server.held

    @property
    def listens(self) -> bool:
        """Whether the client's next bytes are to be read."""
        return self._phase is not Phase.DONE

    @property
    def awaits_server(self) -> bool:
        """Whether the server's bytes are to be read."""
        return self._first is not None or self._phase is Phase.OPENING

    @property
    def awaited(self) -> int:
        """The number of the client's next byte."""
        return self._next + (len(self._client.data) if self._client is not None else 0) & 0xFFFFFFFF

    @property
    def compares(self) -> bool:
        """Whether bytes that were read are kept, to compare with what is sent again."""
        return self._read_bytes is not None

    def contests(self, sequence: int) -> bool:
        """Whether a segment of the client may contradict what was read. sequence: of its first byte."""
        return self.earlier is not None or (self._read_bytes is not None and distance(sequence, self._next) < 0)

    def acknowledged(self, number: int) -> None:
        """The server has taken the client's bytes before this number."""
        if self._read_bytes is not None:
            self._read_bytes.acknowledge(number)
            if not self._read_bytes.held:
                self._read_bytes = None

    def expected(self, requests: Requests | None) -> Expected:
        """What is expected of the server's next packets, where they can only acknowledge what was read."""
        first, last = (0, 0) if self._read_bytes is None else self._read_bytes.ends
        return Expected(first, last, self.server_first, self.soundness(False).stamp, requests)

    def next_of(self, parser: Parser) -> int | None:
        """The number of the next message's first byte, if no message is unfinished and this parser reads the next; else None."""
        waits = self.keeps or self._began is not None
        ends = self.closed or self.ended or self.renewed is not None or self.earlier is not None
        if waits or ends or self._phase is not Phase.LATER or self._parsers != (parser,):
            return None
        return self._next

    def hear(self, heard: Heard) -> None:
        """Apply what packets said that were not shown."""
        for from_client, stamp in ((False, heard.stamp), (True, heard.client_stamp)):
            if stamp is not None:
                self.soundness(from_client).stamp = stamp
        if heard.acknowledged is not None:
            self.acknowledged(heard.acknowledged)
        if heard.next is not None:
            self._next = heard.next
            if heard.piece:
                self._keep(-len(heard.piece), heard.piece)

    def compare_no_more(self) -> None:
        """Drop the bytes that were read."""
        self._read_bytes = None

    def soundness(self, from_client: bool) -> Soundness:
        """What the receiver of one side's segments remembers."""
        if self._soundness is None:
            self._soundness = Soundness(), Soundness()
        return self._soundness[from_client]

    def in_order(self, sequence: int, from_client: bool) -> bool:
        """Whether a segment begins at, or before, the byte that its receiver awaits."""
        if from_client:
            return distance(sequence, self.awaited) <= 0
        first = self.server_first
        return first is None or distance(sequence, first + (len(self._server.data) if self._server else 0)) <= 0

    @property
    def searches(self) -> bool:
        """Whether the client's bytes belong to no message and are only searched."""
        return self._phase is Phase.LATER and is_search(self._parsers)

    def forget(self) -> None:
        """Drop the bytes that wait for others: they are sent again."""
        self._client = self._server = self._first = None

    def give_up(self, reason: str, conflict: bool = False) -> list[Said]:
        """Read nothing more."""
        self._phase = Phase.DONE
        self.forget()
        return [Said(Event.GAVE_UP, {}, reason, conflict)]

    def _differ(self) -> list[Said]:
        """Read nothing more: which bytes the server takes is not known."""
        self.give_up("")
        self._read_bytes = None
        return [Said(Event.DIFFERS, {}, "segments that overlap differ", True)]

    def restart(self, parsers: tuple[Parser, ...]) -> None:
        """Read what comes next as a first message."""
        self._phase = Phase.OPENING
        self._parsers = parsers
        self.forget()
        self._begin_next_message()

    def run_out(self, reason: str) -> list[Said]:
        """Give up a message that exceeds a limit. If the client has begun it, it hides a name: that is a conflict."""
        return self.give_up(reason, conflict=self._client is not None and bool(self._client.data))

    def end(self) -> list[Said]:
        """The client ends within a message, which some servers accept as complete."""
        return self.run_out("the client ended within a message") if self._client is not None and self._client.data else []

    @property
    def unfinished(self) -> bool:
        """Whether a message has begun that is not complete."""
        return self._phase is Phase.OPENING or (self._client is not None and bool(self._client.data))

    def client(self, sequence: int, data: bytes, now: float) -> list[Said]:
        """A segment of the client. sequence: of its first byte. now: seconds."""
        if self.earlier is not None and (said := self._contested(sequence, len(data))):
            return said
        offset = distance(sequence, self._next)
        if offset < 0 and self._read_bytes is not None:
            if self._read_bytes.differs(sequence, data):
                return self._differ()
            if self._read_bytes.lost(sequence):
                return AHEAD
        if self._phase is Phase.DONE or offset + len(data) <= 0:
            # Read before, or the body of a message.
            return []
        if offset >= BYTES:
            return AHEAD
        if self._late(now):
            return self.run_out(f"{SECONDS:.0f} seconds have passed")
        said = []
        if self._client is None and offset <= 0 and self._server is None:
            # Nearly always one packet holds the whole message, and nothing needs to be kept.
            whole = data if offset == 0 else data[-offset:]
            used = self._read(whole, said)
            self._next = self._next + used & 0xFFFFFFFF
            if not self.listens or used >= len(whole):
                self._begin_next_message()
                return said
            self._client = Reassembly(self._next, BYTES)
            self._client.add(self._next, whole[used:])
            if used:
                self._begin_next_message()
        else:
            if self._client is None:
                self._client = Reassembly(self._next, BYTES)
            grew = self._client.add(sequence, data)
            if self._client.conflict:
                return self._differ()
            if self._phase is Phase.LATER and not self._client.data:
                self._client.full = False
                return AHEAD
            if grew and len(self._client.data) >= self._needs and self._advance(said):
                return said
        return self._bounded(said, now)

    def _contested(self, sequence: int, size: int) -> list[Said]:
        """The events of a segment that does not belong to this connection, but to an earlier one or none; empty if it may."""
        assert self.earlier is not None
        if self.answered or self.earlier.over:
            self.earlier = None
            return []
        whose = self.earlier.of(sequence, size)
        return self._differ() if whose is Belongs.EARLIER else AHEAD if whose is Belongs.NONE else []

    def server(self, sequence: int, data: bytes, now: float) -> list[Said]:
        """A segment of the server."""
        if not self.awaits_server:
            return []
        if self._phase is Phase.OPENING and self._late(now):
            return self.run_out(f"{SECONDS:.0f} seconds have passed")
        if self._began is None:
            self._began = now
        if self.server_first is None:
            return []
        if self._server is None:
            self._server = Reassembly(self.server_first, BYTES)
        grew = self._server.add(sequence, data)
        if self._phase is not Phase.OPENING:
            return self._add_from_server() if grew else []
        if self._server.conflict:
            return self._differ()
        said: list[Said] = []
        if grew:
            if self._client is None:
                self._client = Reassembly(self._next, BYTES)
            self._drain(said)
        if self._phase is not Phase.OPENING:
            self._begin_next_message()  # type: ignore[unreachable]  # `_drain` changes the phase
            return said
        return self._bounded(said, now)

    def _late(self, now: float) -> bool:
        return self._began is not None and now - self._began > SECONDS and self.unfinished

    def _advance(self, said: list[Said]) -> bool:
        """Read the bytes that have no gap. Returns whether none are left, or none are to be read."""
        before = self._next
        self._drain(said)
        if (ended := not self.listens or self._client is None) or self._next != before:
            self._begin_next_message()
        return ended

    def _drain(self, said: list[Said]) -> None:
        """Read the bytes that have no gap, and continue after them."""
        while self._client is not None:
            used = self._read(self._client.data, said)
            self._next = self._next + used & 0xFFFFFFFF
            if not used or not self.listens or self._client is None:
                return
            # Bytes that waited behind the body of a message may have no gap now.
            self._client.forget(used)
            if not self._client.held:
                self._client = None
            elif not self._client.data:
                return

    def _begin_next_message(self) -> None:
        """No message is unfinished: the limits begin with the next one."""
        self._began = None
        self._packets = self._needs = 0
        if self._phase is Phase.DONE:
            self._client = None
        if self._first is None:
            self._server = None

    def _bounded(self, said: list[Said], now: float) -> list[Said]:
        """Give up a message that exceeds a limit."""
        if said and any(each.event is Event.MESSAGE for each in said):
            self._begin_next_message()
        if self._began is None:
            self._began = now
        self._packets += 1
        full = (self._client is not None and self._client.full) or self.held > BYTES
        if full or (self._phase is Phase.OPENING and self._server is not None and self._server.full):
            return said + self.run_out("not known after 16 KiB")
        if self._packets >= PACKETS:
            return said + self.run_out(f"{PACKETS} packets with payload, and it is not known")
        return said

    def _read(self, data: bytes, said: list[Said]) -> int:
        """Read the complete messages from the first byte on. Returns how many bytes they take, bodies included."""
        at = 0
        for _ in range(_STEPS):
            rest = data[at:] if at else data
            if not rest and (at or self._phase is Phase.LATER):
                return at
            found = self._parse(rest, said)
            if found is None:
                if not self.listens:
                    self._keep(at, rest)
                    return len(data)
                return at
            self._keep(at, rest[: found.used or None])
            at += found.used + found.skip
            if at > len(data) or not self.listens:
                return at
        said += self.give_up("too many messages in one packet", conflict=True)
        return at

    def _keep(self, at: int, data: bytes) -> None:
        """Keep bytes that were read. at: of the first one, from where the next message begins."""
        if self._read_bytes is None:
            self._read_bytes = ReadBytes()
        self._read_bytes.add(self._next + at & 0xFFFFFFFF, data[:BYTES])

    def _parse(self, data: bytes, said: list[Said]) -> Found | None:
        """Read one message; None where it is not whole, or was given up."""
        server = self._server.data if self._server is not None and self._phase is Phase.OPENING else b""
        remaining, found = parse_first(self._parsers, data, server)
        if not remaining:
            return self._unreadable(data, said)
        self._parsers = remaining
        self._needs = 0 if found is None else found.needs
        if found is None or not found.decided:
            # Within the body of a message nothing changes.
            if found is not WAIT:
                said.append(Said(Event.PART, {} if found is None else found.facts))
            return None
        return self._found(remaining[0], data, found, said)

    def _found(self, parser: Parser, data: bytes, found: Found, said: list[Said]) -> Found:
        if found.facts:
            said.append(Said(Event.MESSAGE, found.facts))
        if self._phase is Phase.OPENING and not found.done:
            self._first = parser, data[: found.used or None]
        then = found.then or lookout_behind(found, data)
        self._phase = Phase.DONE if then is None else Phase.LATER
        self._parsers = () if then is None else (then,)
        return found

    def _unreadable(self, data: bytes, said: list[Said]) -> Found | None:
        """Give up a message that no parser reads; what follows is searched for a ClientHello."""
        if (is_first := self._phase is Phase.OPENING) and looks_encrypted(data):
            said.append(Said(Event.PART, {"encrypted": True}))
        said.append(Said(Event.GAVE_UP, {}, "not a known protocol" if is_first else "not a valid message"))
        self._phase, self._parsers = Phase.LATER, (lookout({}, data, carries=False),)
        self._server = self._first = None
        return self._parse(data, said) if data else None

    def _add_from_server(self) -> list[Said]:
        """What the server's bytes add to the opening."""
        assert self._first is not None
        assert self._server is not None
        parser, opening = self._first
        result = parser(opening, self._server.data)
        done = not isinstance(result, Found) or result.done or self._server.full or self._server.conflict
        if done:
            self._first = self._server = None
        return [Said(Event.ADDED, result.facts)] if isinstance(result, Found) else []
