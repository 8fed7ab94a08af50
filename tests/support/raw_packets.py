"""Packets that a test sends as they are: from its host, or in by the interface `here`, the other end of `there`."""

from __future__ import annotations

import contextlib
import os
import socket

from namespace import PATIENCE

from nfq_agent.checksum import internet_checksum

# The address of `here`.
HERE = bytes.fromhex("020000000001")
# A type of frames that no protocol has (IEEE 802, local experiments).
_LAST = 0x88B5


def with_more(payload: bytes, behind: bytes) -> bytes:
    """A UDP packet with bytes behind its datagram, which is as it was; the IP header is right for all of them."""
    data = bytearray(payload + behind)
    if data[0] >> 4 == 4:
        data[2:4] = len(data).to_bytes(2, "big")
        data[10:12] = b"\0\0"
        data[10:12] = internet_checksum(bytes(data[:20])).to_bytes(2, "big")
    else:
        data[4:6] = (len(data) - 40).to_bytes(2, "big")
    return bytes(data)


def send(data: bytes) -> None:
    """Send a packet from this host."""
    family, level, included = (
        (socket.AF_INET, socket.IPPROTO_IP, socket.IP_HDRINCL) if data[0] >> 4 == 4 else (socket.AF_INET6, 41, 36)
    )
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        raw.setsockopt(level, included, 1)
        to = socket.inet_ntop(family, data[16:20] if family == socket.AF_INET else data[24:40])
        with contextlib.suppress(PermissionError):
            # What a rule drops.
            raw.sendto(data, (to, 0))


def receive(data: bytes) -> None:
    """Let a packet come in by the interface `here`, and wait until it has passed the rules: then a frame behind it is there.

    Both are sent by one processor, whose backlog keeps their order.
    """
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    kind = 0x0800 if data[0] >> 4 == 4 else 0x86DD
    with (
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw,
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as behind,
    ):
        raw.bind(("there", kind))
        behind.bind(("here", _LAST))
        behind.settimeout(PATIENCE)
        raw.send(HERE + bytes(6) + kind.to_bytes(2, "big") + data)
        raw.send(HERE + bytes(6) + _LAST.to_bytes(2, "big"))
        behind.recv(100)
