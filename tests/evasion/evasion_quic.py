"""Evasions by packets of QUIC that no usual client makes, against aioquic."""

from __future__ import annotations

import os
from functools import partial

from evasion_attempt import Attempt
from evasion_line import Line
from evasion_servers import QUIC
from evasion_tls import send_flight
from quic_flights import QuicOpening

_PING = b"\1"
_LEAST = 1200


def _send(attempt: Attempt, datagram: bytes) -> None:
    with attempt.udp(QUIC) as client:
        send_flight(client, [datagram])


def _behind_packets(count: int, size: int, attempt: Attempt, name: str) -> None:
    """Packets that no server can open come before it in the datagram."""
    made = QuicOpening(name)
    junk = b"".join(made.head(size) + os.urandom(size) for _ in range(count))
    _send(attempt, junk + made.whole(least=_LEAST - len(junk)))


def _behind_frames(attempt: Attempt, name: str) -> None:
    made = QuicOpening(name)
    _send(attempt, made.packet(_PING * 400 + made.crypto(), least=_LEAST))


def _long_frame_type(attempt: Attempt, name: str) -> None:
    made = QuicOpening(name)
    _send(attempt, made.packet(made.crypto(b"\x40\6"), least=_LEAST))


def _two_connections(attempt: Attempt, name: str) -> None:
    """A server reads the first alone."""
    allowed = QuicOpening(attempt.allowed)
    _send(attempt, QuicOpening(name).whole(least=700) + allowed.whole(least=600))


LINES = (
    Line(
        "quic-behind-packets",
        "QUIC: eight Initial packets that cannot be opened before it in the datagram",
        partial(_behind_packets, 8, 24),
        twin=True,
    ),
    Line(
        "quic-behind-short-packet",
        "QUIC: a packet too short for a sample before it in the datagram",
        partial(_behind_packets, 1, 5),
    ),
    Line("quic-behind-frames", "QUIC: 400 PING frames before the ClientHello", _behind_frames, twin=True),
    Line("quic-frame-type", "QUIC: the type of the CRYPTO frame in two bytes", _long_frame_type),
    Line("quic-two-connections", "QUIC: an allowed connection behind it in one datagram", _two_connections, twin=True),
)
