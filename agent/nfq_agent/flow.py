"""A flow: what is remembered of both directions of one conversation. Values only; nfq_agent.flow_table keeps them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from nfq_agent.packet import FiveTuple


class Watch:
    """Which packets of a flow an element has to be shown (`PacketElement.watches`): numbers that are joined with `|`.

    CLIENT, SERVER: with payload, of that side. CLIENT_BARE, SERVER_BARE: without payload. DATA: with payload, of both. ALL: every
    packet. DNS, QUIC: datagrams that may be a message of DNS or have a wrong checksum, and those of QUIC's handshake.
    ACKNOWLEDGEMENT: those of the server that say more than `Flow.expects` tells. REQUEST: the same of the client.
    """

    NOTHING: Final = 0
    CLIENT: Final = 1
    SERVER: Final = 2
    CLIENT_BARE: Final = 4
    SERVER_BARE: Final = 8
    DNS: Final = 16
    QUIC: Final = 32
    ACKNOWLEDGEMENT: Final = 64
    REQUEST: Final = 128
    DATA: Final = CLIENT | SERVER
    ALL: Final = CLIENT | SERVER | CLIENT_BARE | SERVER_BARE


class Requests(NamedTuple):
    """HTTP requests for the host of the one before, in the plain form: they are not shown.

    next: the number of the first byte. stamp: as in `Expected`, of the client. host: as the fact has it, in letters, digits, `-`,
    `_` and `.` alone.
    """

    next: int
    stamp: int | None
    host: bytes


class Expected(NamedTuple):
    """The server's next packets, where they only acknowledge what was read: they are not shown as long as they are sound.

    first, last: the numbers behind the first and the last piece that was read. opening: the number of the server's first byte,
    None where it is not known. stamp: the timestamp that the next must not be older than, None where there are none. requests:
    those of the client's packets that need not be shown either, as long as no element reads more of them than the host.
    """

    first: int
    last: int
    opening: int | None
    stamp: int | None
    requests: Requests | None = None


class Heard(NamedTuple):
    """What those packets have said, None for nothing.

    acknowledged: the number before which the server has taken all. stamp, client_stamp: the latest timestamp of each side. next:
    the number behind the latest request. piece: the bytes of that request, if they are not acknowledged.
    """

    acknowledged: int | None
    stamp: int | None
    client_stamp: int | None
    next: int | None
    piece: bytes


# The fact that has the name of the first message, by protocol.
NAME_FACTS: Final = {"http": "http_host", "tls": "tls_sni", "dns": "dns_name"}


class Asked:
    """What a chain is asked to foresee: a first message by its protocol, or what comes without one.

    SYN: of a connection. DNS_AGAIN: a message of a flow that asked for another name before. QUIET: a datagram of a flow that has
    said nothing so far. GAVE_UP: one after which it is known that the flow will say nothing.
    """

    SYN: Final = ""
    HTTP: Final = "http"
    TLS: Final = "tls"
    DNS: Final = "dns"
    DNS_AGAIN: Final = "dns again"
    QUIET: Final = "quiet"
    GAVE_UP: Final = "gave up"


class Opening(NamedTuple):
    """What is known of a TCP connection that was shown to no element, because their answers were known.

    initial: the client's initial sequence number. server_first: the number of the server's first byte, None without an answer.
    protocol, name: of the first message, empty if it has not come. next: the number behind the latest message, or of `piece`: the
    bytes of the latest message, if they are not acknowledged; first: that is the first one. done: what follows is not to be read.
    client_stamp, stamp: the latest timestamps. closed, ended: a FIN was seen, one of the client. earlier: where the client of an
    earlier connection on the same five-tuple began and was. began, pieces: when the first message began, in seconds, and in how
    many segments it came. details: what a ClientHello says besides its name, as `nfq_agent.unshown.details_of` writes it; empty
    where no element reads it.

    A protocol without a name: only the beginning of the first message has come.
    """

    initial: int
    server_first: int | None
    protocol: str
    name: str
    next: int
    done: bool
    piece: bytes
    first: bool
    client_stamp: int | None
    stamp: int | None
    closed: bool
    ended: bool
    earlier: tuple[int, int] | None
    began: float = 0.0
    pieces: int = 0
    details: bytes = b""


class Exchange(NamedTuple):
    """The same of a UDP flow: its latest message of DNS, or how much it has sent without saying anything.

    packets, size: those datagrams and their payload's bytes. began: when the first of them came, in seconds. gave_up: it is known
    that no message will come but one of DNS or QUIC.
    """

    protocol: str
    name: str
    packets: int
    size: int
    began: float
    gave_up: bool


class Account(NamedTuple):
    """What has passed of a flow: packets and bytes of the client and of the server, and when the latest came, in seconds.

    Bytes are counted from the IP header on. A packet that an offload joined counts as one.
    """

    packets_sent: int
    bytes_sent: int
    packets_received: int
    bytes_received: int
    last: float

    def since(self, before: Account) -> Account:
        """What has passed after another account of the same flow."""
        return Account(
            self.packets_sent - before.packets_sent,
            self.bytes_sent - before.bytes_sent,
            self.packets_received - before.packets_received,
            self.bytes_received - before.bytes_received,
            self.last,
        )


@dataclass(slots=True)
class Flow:
    """What is remembered of one conversation.

    origin: the five-tuple of the first packet seen. first, last: when its first and latest packets came, seconds on the
    clock that the caller uses. packets: how many, both ways. facts: what elements found out and share, by attribute name
    ("tls_sni"); "dpi" is "undecided", "decided" or "gave-up". state: what an element keeps for itself, by the element.
    undecided: True while an answer is for the packet alone, since something about the flow is not known yet.
    origin_is_client: the client sends the packets with that five-tuple.
    message: the number of the message that the facts are of. earlier: the facts of messages that the packet at hand brings
    besides, before that one. ahead: the packet at hand cannot be judged before bytes that have not come yet.
    unsound: why the receiver of the packet at hand discards it, so that nothing of it was read; empty if it does not.
    answered: both sides were seen. midstream: its beginning was not seen, nor is it known what it has said.
    kept: since when the kernel keeps its verdict, in seconds, so that neither what it says then nor its end is seen; None where
    it does not.
    expects: packets of the server that need not be shown. heard: what they said, since the last packet that was shown.
    opening: what its packets have said, if no element was shown any of them yet.
    """

    origin: FiveTuple
    first: float
    last: float
    packets: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    state: dict[object, Any] = field(default_factory=dict)
    undecided: bool = False
    origin_is_client: bool = True
    message: int = 0
    earlier: tuple[dict[str, Any], ...] = ()
    ahead: bool = False
    unsound: str = ""
    answered: bool = False
    midstream: bool = False
    kept: float | None = None
    expects: Expected | None = None
    heard: Heard | None = None
    opening: Opening | Exchange | None = None
