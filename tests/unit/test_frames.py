"""The ring of a tap on memory that is laid out as the kernel does it, and the fakes of ring and frames: one contract."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Sequence

import pytest
from fake_frames import FakeFrames, FakeRing, Frame
from frames_contract import (
    AnyRing,
    a_ring_judges_by_flows,
    a_ring_looks_verdicts_up,
    a_ring_reads_its_frames_in_order,
    frames_are_judged_by_flows,
    frames_are_read_judged_and_sent_on,
)

from nfq_agent.host.ring import OUTGOING, SEGMENTED, UNFINISHED, Ring

BLOCK, BLOCKS, FRAMES_OF_A_BLOCK = 4096, 4, 2
RingOf = Callable[[Sequence[Frame], int], AnyRing]


def fake_ring(frames: Sequence[Frame], interface: int) -> AnyRing:
    ring = FakeRing(interface)
    ring.frames.extend(frames)
    return ring


def block_of(frames: Sequence[Frame]) -> bytes:
    """struct tpacket_block_desc with frames behind struct tpacket3_hdr and struct sockaddr_ll (linux/if_packet.h)."""
    data = struct.pack("=IIIII", 1, 0, 1, len(frames), 48).ljust(48, b"\0")
    for frame in frames:
        room = (82 + len(frame.data) + 15) & ~15
        status = 1 | (1 << 3 if frame.flags & UNFINISHED else 0) | (1 << 8 if frame.flags & SEGMENTED else 0)
        seconds, length = int(frame.seconds), len(frame.data)
        header = struct.pack("=IIIIIIHH", room, seconds, int((frame.seconds - seconds) * 1e9), length, length, status, 82, 96)
        header = header.ljust(58, b"\0") + bytes((4 if frame.flags & OUTGOING else 0,))
        data += (header.ljust(82, b"\0") + frame.data).ljust(room, b"\0")
    return data.ljust(BLOCK, b"\0")


@pytest.fixture(params=["fake", "real"])
def ring_of(request: pytest.FixtureRequest) -> Iterator[RingOf]:
    if request.param == "fake":
        yield fake_ring
        return
    memory = os.memfd_create("ring")
    os.ftruncate(memory, BLOCK * BLOCKS)

    def real_ring(frames: Sequence[Frame], interface: int) -> AnyRing:
        for start in range(0, len(frames), FRAMES_OF_A_BLOCK):
            os.pwrite(memory, block_of(frames[start : start + FRAMES_OF_A_BLOCK]), start // FRAMES_OF_A_BLOCK * BLOCK)
        return Ring(memory, BLOCK, BLOCKS, interface)

    yield real_ring
    os.close(memory)


@pytest.mark.parametrize("promise", [a_ring_reads_its_frames_in_order, a_ring_looks_verdicts_up, a_ring_judges_by_flows])
def test_a_ring(ring_of: RingOf, promise: Callable[[RingOf], None]) -> None:
    promise(ring_of)


class FakeWorld:
    def __init__(self) -> None:
        self.frames = FakeFrames()

    def arrive(self, *frames: Frame) -> None:
        self.frames.waiting.extend(frames)

    def sent(self) -> list[tuple[bytes, int]]:
        return self.frames.sent


def test_the_frames_in_memory() -> None:
    frames_are_read_judged_and_sent_on(FakeWorld())


def test_the_frames_in_memory_are_judged_by_flows() -> None:
    frames_are_judged_by_flows(FakeWorld())
