"""The pair of an inline link: it carries frames as soon as it is made."""

from __future__ import annotations

import socket

import pytest
from namespace import Namespace

from nfq_agent.host import pairs

pytestmark = pytest.mark.kernel

ETH_P_ALL = 3
HEADER = b"\2" * 12 + b"\x88\xb5"
NAMES = ("nfq0000000000a", "nfq0000000000b")


def _arrived(count: int) -> int:
    """How many frames arrive of those that are sent at once through a new pair."""
    with (
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as near,
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as far,
        pairs.PairSocket() as writer,
    ):
        index, _ = writer.make_pair(*NAMES, "nfq-agent:test:pods")
        near.bind((NAMES[0], ETH_P_ALL))
        far.bind((NAMES[1], ETH_P_ALL))
        for number in range(count):
            near.send(HEADER + bytes((number,)) * 50)
        # What is lost does not come at all.
        far.settimeout(10)
        seen: set[int] = set()
        try:
            while len(seen) < count:
                frame = far.recv(200)
                if frame.startswith(HEADER):
                    seen.add(frame[len(HEADER)])
        except TimeoutError:
            pass
        writer.remove(index)
        return len(seen)


def test_a_new_pair_loses_nothing(netns: Namespace) -> None:
    """A stop and a start of an inline link lost datagrams now and then: the kernel had not activated the pair yet."""
    assert [netns.call(_arrived, 10) for _ in range(10)] == [10] * 10
