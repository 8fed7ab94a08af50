"""Netlink messages to the kernel's packet queues: settings and verdicts, as bytes. Pure; packet_message.pxd reads packets.

Formats are those of linux/netfilter/nfnetlink_queue.h and net/netfilter/nfnetlink_queue.c.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import IntFlag
from socket import AF_INET, AF_INET6
from struct import Struct
from typing import Final

from nfq_agent.host.attributes import attribute
from nfq_agent.packet import Packet
from nfq_agent.verdict import Action, Verdict

# An attribute's length has 16 bits and counts its own header of 4 bytes.
MAX_PAYLOAD: Final = 65531
# Room for the longest message of a packet: its payload, and its other attributes, which take 160 bytes when all are there.
LONGEST_MESSAGE: Final = 65536 + 4096

COPY_MODES: Final = {"meta": 1, "packet": 2}
FAMILIES: Final = {"unspec": 0, "inet": int(AF_INET), "inet6": int(AF_INET6)}

MSG_PACKET: Final = 3 << 8
MSG_VERDICT: Final = 3 << 8 | 1
MSG_CONFIG: Final = 3 << 8 | 2
MSG_VERDICT_BATCH: Final = 3 << 8 | 3
NLMSG_ERROR: Final = 2

_REQUEST: Final = 1
_REQUEST_ACK: Final = 5
# enum nfqnl_attr_type
_A_VERDICT_HDR: Final = 2
_A_MARK: Final = 3
_A_PAYLOAD: Final = 10
# enum nfqnl_attr_config
_CFG_COMMAND, _CFG_PARAMETERS, _CFG_MAX_LEN, _CFG_MASK, _CFG_FLAGS = range(1, 6)
# Bytes in one send: netlink refuses more than the send buffer (net/netlink/af_netlink.c), which is 212,992 by default.
_SEND_LIMIT: Final = 131072
# Packets that one batch answers: the kernel finds them with the queue locked, and the senders wait that long.
SLICE: Final = 256

_HEADER: Final = Struct("=IHHIIBB2s")
_ERROR: Final = Struct("=IHHIIi")
_VERDICT_HEADER: Final = Struct("!II")
_SINGLE: Final = Struct("=IHHIIBB2sHH8s")
_U32: Final = Struct("!I")

# The key of a known verdict: hook, interfaces, protocol, addresses and ports.
FlowKey = bytes
# Neighbours with the same verdict: id of the last, how many, verdict.
Run = tuple[int, int, Verdict]
# How many packets, the number of the first, the runs, and a packet that is still to be given this verdict.
FlowTurn = tuple[int, int, list[Run], tuple[Packet, Verdict] | None]


class Flag(IntFlag):
    """The switches of a queue (NFQA_CFG_FLAGS)."""

    FAIL_OPEN = 1
    CONNTRACK = 2
    GSO = 4
    UID_GID = 8
    SECCTX = 16


def message(kind: int, sequence: int, number: int, attributes: bytes, flags: int = _REQUEST_ACK) -> bytes:
    """A message about queue `number`, which the kernel acknowledges under `sequence`."""
    # The queue's number is in network order, the rest of the header in the host's.
    return _HEADER.pack(_HEADER.size + len(attributes), kind, flags, sequence, 0, 0, 0, number.to_bytes(2, "big")) + attributes


def acknowledgement(data: bytes) -> tuple[int, int] | None:
    """Sequence number and errno of a message that acknowledges or refuses; None for any other."""
    if len(data) < _ERROR.size or int.from_bytes(data[4:6], "little") != NLMSG_ERROR:
        return None
    _, _, _, sequence, _, code = _ERROR.unpack_from(data)
    return sequence, -code


# Settings, as attributes.


def bind_command(command: int, family: int) -> bytes:
    """A command: 1 binds, 2 unbinds, 4 unbinds a protocol family, which has been without effect since Linux 3.8."""
    return attribute(_CFG_COMMAND, bytes((command, 0)) + family.to_bytes(2, "big"))


def copy_setting(copy_mode: int, copy_range: int) -> bytes:
    """Copy mode and range in bytes."""
    return attribute(_CFG_PARAMETERS, _U32.pack(copy_range) + bytes((copy_mode,)))


def max_len_setting(max_len: int) -> bytes:
    """How many packets may wait."""
    return attribute(_CFG_MAX_LEN, _U32.pack(max_len))


def flag_setting(flag: Flag, on: bool) -> bytes:
    """One flag, set or cleared."""
    return attribute(_CFG_MASK, _U32.pack(flag)) + attribute(_CFG_FLAGS, _U32.pack(flag if on else 0))


def no_packets_verdict() -> bytes:
    """A verdict for the number 0, which no packet has: numbers begin at 1."""
    return attribute(_A_VERDICT_HDR, _VERDICT_HEADER.pack(1, 0))


def cutting(number: int) -> bytes:
    """Messages that have queue `number` queue a packet again with its GSO flag off, and switch the flag on again.

    The packet's number is the four bytes from byte 64 on.
    """
    off, on = (message(MSG_CONFIG, 0, number, flag_setting(Flag.GSO, wanted), _REQUEST) for wanted in (False, True))
    return off + VerdictMessages(number).single(0, Verdict(Action.QUEUE, queue=number)) + on


# Verdicts, as whole messages that the kernel does not acknowledge.


class VerdictMessages:
    """The verdict messages of one queue."""

    def __init__(self, number: int) -> None:
        self._number = number.to_bytes(2, "big")

    def single(self, identity: int, verdict: Verdict) -> bytes:
        """The verdict of one packet."""
        body = _VERDICT_HEADER.pack(verdict.code, identity)
        if verdict.mark is None and verdict.payload is None:
            return _SINGLE.pack(32, MSG_VERDICT, _REQUEST, 0, 0, 0, 0, self._number, 12, _A_VERDICT_HDR, body)
        attributes = b""
        if verdict.mark is not None:
            attributes = attribute(_A_MARK, _U32.pack(verdict.mark))
        if verdict.payload is not None:
            attributes += attribute(_A_PAYLOAD, verdict.payload)
        length = 32 + len(attributes)
        return _SINGLE.pack(length, MSG_VERDICT, _REQUEST, 0, 0, 0, 0, self._number, 12, _A_VERDICT_HDR, body) + attributes

    def batch(self, identity: int, verdict: Verdict) -> bytes:
        """One verdict for every packet up to `identity` that still waits."""
        body = _VERDICT_HEADER.pack(verdict.code, identity)
        number = self._number
        if verdict.mark is None:
            return _SINGLE.pack(32, MSG_VERDICT_BATCH, _REQUEST, 0, 0, 0, 0, number, 12, _A_VERDICT_HDR, body)
        mark = attribute(_A_MARK, _U32.pack(verdict.mark))
        return _SINGLE.pack(40, MSG_VERDICT_BATCH, _REQUEST, 0, 0, 0, 0, number, 12, _A_VERDICT_HDR, body) + mark

    def runs(self, runs: Iterable[Run], alike: bool = False) -> list[bytes]:
        """The verdicts of runs of neighbours, in slices that are not too long. No older packet may still wait.

        alike: every message is a batch, also that of one packet, so that all have one shape.
        """
        messages: list[bytes] = []
        for last, count, verdict in runs:
            messages += [self.batch(part, verdict) for part in slices(last, count)]
            one = count == 1 and (verdict.payload is not None or not alike)
            messages.append(self.single(last, verdict) if one else self.batch(last, verdict))
        return messages


def slices(last: int, count: int) -> list[int]:
    """The numbers of the batches before the one up to `last`, for at most `SLICE` packets each.

    Numbers have 32 bits, and gaps where a packet did not fit into the socket.
    """
    return [part & 0xFFFFFFFF for part in range(last - count + SLICE, last, SLICE)]


def sends(messages: list[bytes]) -> Iterator[bytes]:
    """The messages, joined into as few sends as netlink takes."""
    data = b"".join(messages)
    if len(data) <= _SEND_LIMIT:
        if data:
            yield data
        return
    part: list[bytes] = []
    size = 0
    for one in messages:
        if part and size + len(one) > _SEND_LIMIT:
            yield b"".join(part)
            part, size = [], 0
        part.append(one)
        size += len(one)
    yield b"".join(part)
