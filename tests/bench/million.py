"""A million flows of one packet each, as frames: their checksums are right, and no two have the same ends."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Final

from nfq_agent.checksum import mend
from nfq_agent.packet import Packet

SOURCES: Final = 16
OF_EACH: Final = 62_500


def frames(server: bytes, packet: Callable[[str], Packet]) -> Iterator[bytearray]:
    """The frame of each flow, valid until the next one is asked for.

    server: the link-layer address that they go to. packet: makes a flow's packet from the ends of its client.
    """
    for number in range(SOURCES):
        payload = bytearray(packet(f"10.{64 + number}.0.0:65535").payload)
        payload[4:6] = b"\xff\xff"
        frame = bytearray(server + bytes(6) + b"\x08\x00" + mend(bytes(payload)))
        for each in range(OF_EACH):
            # What the address gets the number and the port lose: the checksums stay right.
            struct.pack_into("!H", frame, 14 + 4, 0xFFFF - each)
            struct.pack_into("!H", frame, 14 + 14, each)
            struct.pack_into("!H", frame, 14 + 20, 0xFFFF - each)
            yield frame
