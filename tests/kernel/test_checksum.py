"""Mended checksums, compared with those that the kernel computes, and with RFC 1071's example."""

from __future__ import annotations

import os
import socket

import pytest
from namespace import Namespace

from nfq_agent.checksum import mend


@pytest.mark.kernel
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_as_the_kernel_computes_them(netns: Namespace, family: int) -> None:
    """Packets that went over a veth pair without offloads carry checksums that `mend` does not change."""
    netns.shell(
        "ip link add va type veth peer name vb; ip addr add 10.9.0.1/24 dev va; ip -6 addr add fd00:9::1/64 dev va nodad;"
        "ip link set va up; ip link set vb up; ethtool -K va tx off >/dev/null;"
        "ip neigh add 10.9.0.2 lladdr 02:00:00:00:00:02 dev va; ip neigh add fd00:9::2 lladdr 02:00:00:00:00:02 dev va"
    )
    for payload in netns.call(_captured, family):
        assert mend(payload) == payload
        assert mend(bytes((*payload[:-1], payload[-1] ^ 1))) != payload


def _captured(family: int) -> list[bytes]:
    tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800 if family == socket.AF_INET else 0x86DD))
    tap.bind(("vb", 0))
    tap.settimeout(10)
    where = "10.9.0.2" if family == socket.AF_INET else "fd00:9::2"
    sender = socket.socket(family, socket.SOCK_DGRAM)
    for length in (1, 2, 101, 1200):
        sender.sendto(os.urandom(length), (where, 4000))
    caller = socket.socket(family, socket.SOCK_STREAM)
    caller.setblocking(False)
    caller.connect_ex((where, 4001))
    caught: list[bytes] = []
    protocols: set[int] = set()
    while len(caught) < 5 or protocols != {6, 17}:
        frame = tap.recv(4096)[14:]
        protocol = frame[9] if family == socket.AF_INET else frame[6]
        if protocol in (6, 17):
            protocols.add(protocol)
            caught.append(frame)
    return caught
