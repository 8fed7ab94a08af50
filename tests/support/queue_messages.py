"""Messages as the kernel's queue writes them, and a socket in place of the kernel's."""

from __future__ import annotations

import contextlib
import socket
from collections import deque
from struct import Struct

from hostile import SEEDS, mutated
from hypothesis import strategies as st

from nfq_agent.host.attributes import attribute
from nfq_agent.host.nfqueue import inbox as compiled
from nfq_agent.host.nfqueue.channel import make_packet
from nfq_agent.host.nfqueue.messages import MSG_PACKET
from nfq_agent.packet import Packet
from nfq_agent.verdict import ACCEPT, Verdict

# A verdict message; its number is the last thing in it.
ACCEPT_MESSAGE = bytes(range(28)) + bytes(4)


def message(
    payload: bytes | None,
    identity: int = 1,
    hook: int = 3,
    indev: int = 0,
    outdev: int = 0,
    kind: int = MSG_PACKET,
    more: bytes = b"",
) -> bytes:
    """A packet as the kernel writes it (nfqnl_build_packet_message())."""
    body = attribute(1, identity.to_bytes(4, "big") + b"\x08\0" + bytes((hook,)))
    for number, device in ((5, indev), (6, outdev)):
        if device:
            body += attribute(number, device.to_bytes(4, "big"))
    body += more
    if payload is not None:
        body += attribute(10, payload)
    return Struct("=IHHIIBBH").pack(20 + len(body), kind, 0, 0, 0, 2, 0, 0) + body


def Inbox(descriptor: int, room: int) -> compiled.Inbox:
    return compiled.Inbox(descriptor, room, make_packet)


def sorted_out(*messages: bytes) -> tuple[int, list[tuple[Packet, bytes | None]]]:
    """How many packets were found, and what was asked for each."""
    asked: list[tuple[Packet, bytes | None]] = []

    def decide(packet: Packet, key: bytes | None) -> Verdict:
        asked.append((packet, key))
        return ACCEPT

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as empty:
        empty.setblocking(False)
        empty.bind("")
        count, _, _ = Inbox(empty.fileno(), 4096).sort(1000, deque(messages), {}, decide)
    return count, asked


flips = st.lists(st.tuples(st.integers(0, 79), st.integers(0, 255)), max_size=5)

payloads = st.builds(mutated, st.sampled_from(SEEDS), st.integers(0, 100), flips, st.binary(max_size=20))

# Every attribute of a packet, as the kernel writes it, in its order.
ATTRIBUTES = [
    attribute(3, b"\1\2\3\4"), attribute(4, bytes(16)), attribute(7, b"\0\0\0\7"), attribute(8, b"\0\0\1\0"),
    attribute(9, b"\0\6\0\0\2\1\2\3\4\5\0\0"), attribute(4, (1_700_000_000).to_bytes(8, "big") + (250_000).to_bytes(8, "big")),
    attribute(16, b"\0\0\4\xd2"), attribute(17, b"\0\0\x10\xe1"), attribute(13, b"\0\1\0\0"), attribute(14, b"\0\0\0\2"),
    attribute(14, b"\0\0\0\1"), attribute(99, b"unknown"),
]  # fmt: skip

messages = st.builds(
    message, st.none() | payloads, st.integers(0, 0xFFFFFFFF), st.integers(0, 4), st.integers(0, 99), st.integers(0, 99),
    more=st.lists(st.sampled_from(ATTRIBUTES), max_size=6).map(b"".join),
)  # fmt: skip


def drained(theirs: socket.socket) -> list[bytes]:
    """What was answered so far."""
    theirs.setblocking(False)
    got: list[bytes] = []
    with contextlib.suppress(BlockingIOError):
        while True:
            got.append(theirs.recv(64))
    return got


def set_patience(ours: socket.socket, seconds: float) -> None:
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, Struct("ll").pack(int(seconds), int(seconds % 1 * 1e6)))
