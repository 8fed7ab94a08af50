"""The compiled frames of an inline link on real sockets: marks are read and written; the fake passes the same contract."""

from __future__ import annotations

import socket
import struct

import pytest
from fake_frames import Frame
from frames_contract import frames_are_judged_by_flows, frames_are_read_judged_and_sent_on
from namespace import Namespace

from nfq_agent.host.frames import SEGMENTED, UNFINISHED, Frames

pytestmark = pytest.mark.kernel
_SO_RCVMARK = 75


class RealWorld:
    """A datagram on loopback stands for a frame of the pair; its mark is that of the socket that sends it."""

    def __init__(self) -> None:
        self._ours, self._theirs = (socket.socket(type=socket.SOCK_DGRAM) for _ in range(2))
        for end in (self._ours, self._theirs):
            end.bind(("127.0.0.1", 0))
            end.setsockopt(socket.SOL_SOCKET, _SO_RCVMARK, 1)
        self._ours.connect(self._theirs.getsockname())
        self._theirs.connect(self._ours.getsockname())
        self.frames = Frames(self._ours.fileno(), 16)

    def arrive(self, *frames: Frame) -> None:
        for frame in frames:
            self._theirs.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, struct.pack("=I", frame.mark))
            virtio = bytes((1 if frame.flags & UNFINISHED else 0, 1 if frame.flags & SEGMENTED else 0)) + bytes(8)
            self._theirs.send(virtio + frame.data)

    def sent(self) -> list[tuple[bytes, int]]:
        found: list[tuple[bytes, int]] = []
        self._theirs.setblocking(False)
        while True:
            try:
                data, ancillary, _, _ = self._theirs.recvmsg(4096, 64)
            except BlockingIOError:
                return found
            ((_, _, mark),) = ancillary
            found.append((data, int.from_bytes(mark, "little")))


def test_the_compiled_frames(netns: Namespace) -> None:
    netns.call(lambda: frames_are_read_judged_and_sent_on(RealWorld()))


def test_the_compiled_frames_are_judged_by_flows(netns: Namespace) -> None:
    netns.call(lambda: frames_are_judged_by_flows(RealWorld()))
