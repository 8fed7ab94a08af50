"""Captures made of packets, for the verbs that read them."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Final

import pytest

from nfq_agent.packet import Packet
from nfq_agent.testing import tcp

# Seconds since the epoch.
BEGIN: Final = 1_700_000_000
# Packets without a link layer (LINKTYPE_RAW).
_RAW: Final = 101


def connection(client: str, server: str, *requests: bytes) -> Iterator[Packet]:
    """A handshake and what the client says."""
    yield tcp(client, server, flags="S", seq=1)
    yield tcp(server, client, flags="SA", seq=1, ack=2)
    seq = 2
    for request in requests:
        yield tcp(client, server, request, seq=seq, ack=2)
        seq += len(request)


def capture(path: Path, packets: Iterable[Packet], *, begin: int = BEGIN) -> Path:
    """A pcap file of the packets, a microsecond apart."""
    write(path, ((begin + number / 1e6, packet) for number, packet in enumerate(packets)))
    return path


def write(path: Path, packets: Iterable[tuple[float, Packet]]) -> None:
    """A pcap file of packets, each with its time, seconds since the epoch."""
    with path.open("wb") as out:
        out.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, _RAW))
        for time, packet in packets:
            seconds, rest = divmod(round(time * 1e6), 1_000_000)
            out.write(struct.pack("<IIII", seconds, rest, len(packet.payload), len(packet.payload)) + packet.payload)


def write_ng(path: Path, interfaces: Iterable[str], packets: Iterable[tuple[float, Packet, int, str]]) -> Path:
    """A pcapng file: its interfaces, by name, and packets, each with its time, the number of its interface, and a comment."""
    with path.open("wb") as out:
        out.write(_block(0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1)))
        for name in interfaces:
            out.write(_block(1, struct.pack("<HHI", _RAW, 0, 65535) + _option(2, name) + _option(0, "")))
        for time, packet, interface, comment in packets:
            high, low = divmod(round(time * 1e6), 1 << 32)
            data = packet.payload
            body = struct.pack("<IIIII", interface, high, low, len(data), len(data)) + data + bytes(-len(data) % 4)
            out.write(_block(6, body + (_option(1, comment) + _option(0, "") if comment else b"")))
    return path


def _block(kind: int, body: bytes) -> bytes:
    size = struct.pack("<I", len(body) + 12)
    return struct.pack("<I", kind) + size + body + size


def _option(code: int, text: str) -> bytes:
    value = text.encode()
    return struct.pack("<HH", code, len(value)) + value + bytes(-len(value) % 4)


@contextmanager
def piped(content: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Standard input is a pipe with this content, which has to fit into it. Its descriptor is handed out."""
    feed, end = os.pipe()
    with open(feed, "rb") as stdin:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=stdin))
        with open(end, "wb") as writing:
            writing.write(content)
        yield feed
