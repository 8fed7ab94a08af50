"""TCP connections that begin with a name, as packets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from openings import client_hello

from nfq_agent.flow_table import FlowTable
from nfq_agent.packet import Packet
from nfq_agent.testing import tcp
from nfq_agent.verdict import Verdict

CLIENT: Final = "192.0.2.1:40000"
SERVER: Final = "198.51.100.1:443"
HELLO: Final = client_hello("www.good.test", alpn=("h2", "http/1.1"))
HEAD: Final = b"GET /a?b=c HTTP/1.1\r\nHost: www.good.test\r\nAccept: */*\r\n\r\n"
BAD: Final = client_hello("www.bad.test")
# ChangeCipherSpec, then encrypted records.
REST: Final = b"\x14\3\3\0\1\1\x17\3\3\0\x20" + bytes(32)


def opening(  # one for each thing that differs
    message: bytes, client: str = CLIENT, server: str = SERVER, start: int = 5, more: bytes = b"", ends: bool = True
) -> Iterator[Packet]:
    """The packets of a connection, from its SYN to the last acknowledgement."""
    at, answered = start + 1, 10
    yield tcp(client, server, flags="S", seq=start)
    yield tcp(server, client, flags="SA", seq=9, ack=at)
    yield tcp(client, server, flags="A", seq=at, ack=answered)
    for piece in filter(None, (message, more)):
        yield tcp(client, server, piece, seq=at, ack=answered)
        at += len(piece)
        yield tcp(server, client, b"x" * 100, seq=answered, ack=at)
        answered += 100
    if ends:
        yield tcp(client, server, flags="FA", seq=at, ack=answered)
        yield tcp(server, client, flags="FA", seq=answered, ack=at + 1)
        yield tcp(client, server, flags="A", seq=at + 1, ack=answered + 1)


def start(client: str = CLIENT) -> list[Packet]:
    """The three packets before the first message, which begins at 6."""
    return list(opening(b"", client))[:3]


def segments(message: bytes, cuts: Sequence[int], client: str = CLIENT) -> list[Packet]:
    """A first message, cut at these places."""
    ends = sorted({at % len(message) for at in cuts} - {0})
    pairs = zip([0, *ends], [*ends, len(message)], strict=True)
    return [tcp(client, SERVER, message[begin:end], seq=6 + begin, ack=10) for begin, end in pairs]


def found(table: FlowTable, packet: Packet, now: float = 1.0, mark: int = 0) -> Verdict | None:
    """What the table says of a packet. mark: that of its connection."""
    return table.look_up(packet.payload, packet.length, now, packet.checksum_ready, mark)
