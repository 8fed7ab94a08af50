"""The maps of the programs of `[inline]`, as values: the layout of each (host/inline.bpf.c)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, Literal

from nfq_agent.capture.selection import Range
from nfq_agent.packet import TCP, FiveTuple

ZERO: Final = bytes(4)
# struct live: what the worker writes, and what the program writes
HEARTBEAT: Final = 0
DOWN: Final = 1
DOWN_BYTES: Final = 2
UP: Final = 8
UP_BYTES: Final = 9
BACK: Final = 10
_COUNTS: Final = ("up", "accepted", "dropped", "stale", "full", "tagged", "fragments", "unread")
_BOTH_WAYS: Final = struct.Struct(f"={2 * len(_COUNTS)}Q")
Role = Literal["server", "client", "both"]
# Which ports count: the source port from a container, to it, the destination port from a container, to it.
_SIDES: Final[dict[Role, int]] = {"server": 0b1001, "client": 0b0110, "both": 0b1111}
# How long a decided flow without packets is remembered, in nanoseconds.
_IDLE_TCP: Final = 3600 * 10**9
_IDLE_OTHER: Final = 60 * 10**9
_KEY: Final = struct.Struct("=I2s2sI16s16s")
_FLOW: Final = struct.Struct("=QQII")


def settings(patience: float, most_bytes: int, most: int, pair: int, secret: int, everything: bool, role: Role = "both") -> bytes:
    """struct settings. patience: seconds."""
    return struct.pack("=QQIIIIII", round(patience * 1e9), most_bytes, most, pair, secret, everything, _SIDES[role], 0)


def ports(tcp: Sequence[Range], udp: Sequence[Range]) -> bytes:
    """struct ports: a bit for each port."""
    return _bits(tcp) + _bits(udp)


def _bits(ranges: Sequence[Range]) -> bytes:
    value = 0
    for first, last in ranges:
        value |= ((1 << (last - first + 1)) - 1) << first
    return value.to_bytes(8192, "little")


def no_counts() -> bytes:
    """struct interface, all zero."""
    return bytes(_BOTH_WAYS.size)


def counts(value: bytes) -> dict[str, int]:
    """struct interface, both ways together."""
    numbers = _BOTH_WAYS.unpack(value)
    return {name: numbers[place] + numbers[place + len(_COUNTS)] for place, name in enumerate(_COUNTS)}


def flow_entry(interface: int, five_tuple: FiveTuple, from_container: bool, accept: bool, now: int) -> tuple[bytes, bytes]:
    """The entry of a flow that the kernel is to decide from now on: its key, and struct flow. now: nanoseconds of the monotonic
    clock."""
    local, remote = (five_tuple.src, five_tuple.dst) if from_container else (five_tuple.dst, five_tuple.src)
    ends = (five_tuple.sport, five_tuple.dport) if from_container else (five_tuple.dport, five_tuple.sport)
    near, far = ((port or 0).to_bytes(2, "big") for port in ends)
    idle = _IDLE_TCP if five_tuple.protocol == TCP else _IDLE_OTHER
    key = _KEY.pack(interface, near, far, five_tuple.protocol, local, remote)
    return key, _FLOW.pack(now, idle, accept, 0)
