"""Reads capture files: pcap and pcapng, also compressed by gzip, xz or bzip2, as IP packets. It opens no file.

Formats: draft-ietf-opsawg-pcap, draft-ietf-opsawg-pcapng; link types: https://www.tcpdump.org/linktypes.html. Both byte orders,
micro- and nanoseconds, several sections and interfaces, Ethernet and Linux cooked captures with VLAN tags and PPPoE, PPP, raw IP,
BSD loopback.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from struct import Struct
from struct import error as StructError
from typing import BinaryIO, Final, NamedTuple, Protocol, cast

_PCAP: Final = {0xA1B2C3D4: 1_000_000, 0xA1B23C4D: 1_000_000_000}
_SECTION: Final = 0x0A0D0D0A
_BYTE_ORDER: Final = 0x1A2B3C4D
_INTERFACE, _OLD_PACKET, _SIMPLE, _PACKET = 1, 2, 3, 6
_COMMENT, _IF_NAME, _TSRESOL, _TSOFFSET = 1, 2, 9, 14
# As Linux allows one (dev_valid_name() of net/core/dev.c); captures of queues and of standard input name these instead.
_INTERFACE_NAME: Final = re.compile(r"[^\s/:\\]{1,15}")
_NO_INTERFACE: Final = ("nfqueue", "nflog", "-")
# The longest packet and block that are accepted as valid, in bytes.
_LONGEST: Final = 1 << 24
# By the first bytes: the formats of compression that the standard library reads, and the programs that decompress others.
_COMPRESSED: Final[Mapping[bytes, Callable[[BinaryIO], BinaryIO]]] = {
    b"\x1f\x8b": lambda stream: cast("BinaryIO", gzip.GzipFile(fileobj=stream)),
    b"\xfd7": lambda stream: cast("BinaryIO", lzma.LZMAFile(stream)),  # noqa: SIM115  # it ends with its stream
    b"BZ": lambda stream: cast("BinaryIO", bz2.BZ2File(stream)),
}
_TO_DECOMPRESS: Final = {b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}
_ETHERTYPES: Final = (b"\x08\x00", b"\x86\xdd")
_VLAN_TAGS: Final = (b"\x81\x00", b"\x88\xa8", b"\x91\x00")
_PPPOE_SESSION: Final = b"\x88\x64"
# IPv4 and IPv6 as PPP names them (RFC 1332, RFC 5072).
_PPP: Final = (b"\x00\x21", b"\x00\x57")


class RecordingError(Exception):
    """A file that is not a capture, or one with impossible values."""


class Recorded(NamedTuple):
    """One packet of a capture.

    time: seconds since the epoch. payload: from the IP header on, as much as was kept; None where no IP packet was found. length:
    bytes from the IP header on, before the packet was cut. comment: what a program wrote beside it. interface: where it was
    captured, by the name that the capture has; empty where it names none.
    """

    time: float
    payload: bytes | None
    length: int
    comment: str
    interface: str = ""


class _Source(Protocol):
    """What is read from."""

    def read(self, size: int, /) -> bytes:
        """Up to so many bytes, fewer at the end alone."""


class _Begun:
    """A stream of which the first bytes were read already."""

    def __init__(self, start: bytes, stream: BinaryIO) -> None:
        self._start = start
        self._stream = stream

    def read(self, size: int = -1, /) -> bytes:
        """As a file's."""
        if not self._start:
            return self._stream.read(size)
        start, self._start = (self._start, b"") if size < 0 else (self._start[:size], self._start[size:])
        return start if len(start) == size else start + self._stream.read(size - len(start) if size >= 0 else -1)


class _Reader:
    """Whole records of a stream. Raises RecordingError where the stream ends within one."""

    def __init__(self, stream: _Source) -> None:
        self._stream = stream
        self.at = 0

    def read(self, size: int, may_end: bool = False) -> bytes:
        """Exactly `size` bytes; none at the end of the stream where it may end."""
        try:
            data = self._stream.read(size)
        except (OSError, lzma.LZMAError, zlib.error, EOFError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                # Of the file itself.
                raise
            raise RecordingError(f"the compressed capture is broken at byte {self.at} of its content: {error}") from error
        self.at += len(data)
        if len(data) < size and not (may_end and not data):
            raise RecordingError(f"the capture ends within a record, at byte {self.at}")
        return data


def packets(stream: BinaryIO) -> Iterator[Recorded]:
    """The packets in the order of the file. Raises RecordingError."""
    start = stream.read(2)
    begun = _Begun(start, stream)
    opened = _COMPRESSED.get(start)
    reader = _Reader(begun if opened is None else opened(cast("BinaryIO", begun)))
    start = reader.read(4, may_end=True)
    little, big = int.from_bytes(start, "little"), int.from_bytes(start, "big")
    if little == _SECTION:
        yield from _pcapng(reader)
    elif little in _PCAP or big in _PCAP:
        yield from _pcap(reader, "<" if little in _PCAP else ">", _PCAP.get(little) or _PCAP[big])
    elif program := _TO_DECOMPRESS.get(start):
        raise RecordingError(f"it is compressed by {program}; decompress it first, as by `{program} -d FILE`")
    else:
        raise RecordingError("not a capture; allowed: pcap and pcapng files")


def _pcap(reader: _Reader, order: str, per_second: int) -> Iterator[Recorded]:
    head = Struct(order + "HHiIII").unpack(reader.read(20))
    link = head[5] & 0xFFFF
    if link not in _FIXED and link not in _SAID:
        raise RecordingError(f"packets of link type {link} are not read; allowed: {_LINKS}")
    record = Struct(order + "IIII")
    while data := reader.read(16, may_end=True):
        seconds, part, kept, length = record.unpack(data)
        _believe(kept, reader)
        yield _recorded(seconds + part / per_second, link, reader.read(kept), length, "")


@dataclass(slots=True)
class _Interface:
    """An interface of a recording. link: its link type. per_second: units of its times. offset: seconds to add to them."""

    link: int
    snap: int
    per_second: int = 1_000_000
    offset: int = 0
    name: str = ""


def _pcapng(reader: _Reader) -> Iterator[Recorded]:
    order = "<"
    interfaces: list[_Interface] = []
    kind_bytes = _SECTION.to_bytes(4, "little")
    while kind_bytes:
        size_bytes = reader.read(4)
        if kind_bytes == b"\x0a\x0d\x0d\x0a":
            mark = reader.read(4)
            order = "<" if int.from_bytes(mark, "little") == _BYTE_ORDER else ">"
            if Struct(order + "I").unpack(mark)[0] != _BYTE_ORDER:
                raise RecordingError(f"a section without its byte order, at byte {reader.at}")
            interfaces = []
            size = Struct(order + "I").unpack(size_bytes)[0] - 4
        else:
            size = Struct(order + "I").unpack(size_bytes)[0]
        if size < 12 or size % 4:
            raise RecordingError(f"a block of {size} bytes, at byte {reader.at}")
        _believe(size, reader)
        body = reader.read(size - 8)[:-4]
        try:
            found = _block(order, Struct(order + "I").unpack(kind_bytes)[0], body, interfaces)
        except (StructError, IndexError) as error:
            raise RecordingError(
                f"a block that is too short, or of an interface that was not described, at byte {reader.at}"
            ) from error
        if found is not None:
            yield found
        kind_bytes = reader.read(4, may_end=True)


def _block(order: str, kind: int, body: bytes, interfaces: list[_Interface]) -> Recorded | None:
    """The packet of a block; None where it has none. Interfaces are noted."""
    if kind == _INTERFACE:
        link, snap = Struct(order + "HxxI").unpack_from(body)
        interfaces.append(_described(order, _Interface(link, snap), body[8:]))
    elif kind in (_PACKET, _OLD_PACKET):
        # The obsolete block has an interface of 16 bits and a count of drops in place of one of 32 bits.
        layout = "IIIII" if kind == _PACKET else "HxxIIII"
        number, high, low, kept, length = Struct(order + layout).unpack_from(body)
        interface = interfaces[number]
        time = interface.offset + (high << 32 | low) / interface.per_second
        comment = "; ".join(
            value.decode(errors="replace") for code, value in _options(order, body[20 + (kept + 3 & ~3) :]) if code == _COMMENT
        )
        return _recorded(time, interface.link, body[20 : 20 + kept], length, comment, interface.name)
    elif kind == _SIMPLE:
        interface = interfaces[0]
        length = Struct(order + "I").unpack_from(body)[0]
        kept = min(length, interface.snap or length)
        # It has no time.
        return _recorded(0.0, interface.link, body[4 : 4 + kept], length, "", interface.name)
    return None


def _described(order: str, interface: _Interface, options: bytes) -> _Interface:
    for code, value in _options(order, options):
        if code == _TSRESOL and value:
            interface.per_second = 1 << (value[0] & 0x7F) if value[0] & 0x80 else 10 ** value[0]
        elif code == _TSOFFSET and len(value) == 8:
            interface.offset = Struct(order + "q").unpack(value)[0]
        elif code == _IF_NAME:
            interface.name = _interface_name(value.decode(errors="replace"))
    return interface


def _interface_name(text: str) -> str:
    """The name of a network interface; empty for what stands for several, and for what is none."""
    text = text.rstrip("\0")
    return text if _INTERFACE_NAME.fullmatch(text) and not text.startswith(_NO_INTERFACE) and text != "any" else ""


def _options(order: str, data: bytes) -> Iterator[tuple[int, bytes]]:
    head = Struct(order + "HH")
    at = 0
    while at + 4 <= len(data):
        code, size = head.unpack_from(data, at)
        if code == 0:
            return
        yield code, data[at + 4 : at + 4 + size]
        at += 4 + (size + 3 & ~3)


def _recorded(time: float, link: int, frame: bytes, length: int, comment: str, interface: str = "") -> Recorded:
    at = _SAID[link](frame) if link in _SAID else _FIXED.get(link, -1)
    if at < 0 or len(frame) <= at or frame[at] >> 4 not in (4, 6):
        return Recorded(time, None, length, comment, interface)
    return Recorded(time, frame[at:], max(length - at, 0), comment, interface)


def _ethernet(frame: bytes) -> int:
    return _behind(frame, 12)


def _behind(frame: bytes, at: int) -> int:
    """Where the IP packet begins behind an Ethernet type, VLAN tags, and the header of PPPoE (RFC 2516); -1 if there is none."""
    kind = frame[at : at + 2]
    while kind in _VLAN_TAGS:
        at += 4
        kind = frame[at : at + 2]
    if kind in _ETHERTYPES:
        return at + 2
    return _ppp(frame, at + 8) if kind == _PPPOE_SESSION else -1


def _ppp(frame: bytes, at: int = 0) -> int:
    """The same behind the protocol of PPP, which may be behind an address and a control field (RFC 1662)."""
    if frame[at : at + 2] == b"\xff\x03":
        at += 2
    if frame[at : at + 2] in _PPP:
        return at + 2
    # The upper byte may be left out (RFC 1661 6.5).
    return at + 1 if b"\0" + frame[at : at + 1] in _PPP else -1


def _cooked(frame: bytes) -> int:
    return _behind(frame, 14)


def _cooked2(frame: bytes) -> int:
    # The protocol is the first field, and what follows it the end of the header.
    kind = frame[0:2]
    if kind in _ETHERTYPES:
        return 20
    at = _behind(kind + frame[20:], 0)
    return at if at < 0 else at + 18


_LINKS: Final = "Ethernet, Linux cooked, PPP, raw IP, BSD loopback"
# Where the IP packet begins in a frame, by link type: at a fixed place, or as the frame says.
_FIXED: Final = {0: 4, 12: 0, 14: 0, 101: 0, 108: 4, 228: 0, 229: 0}
_SAID: Final[Mapping[int, Callable[[bytes], int]]] = {1: _ethernet, 9: _ppp, 50: _ppp, 113: _cooked, 276: _cooked2}


def _believe(size: int, reader: _Reader) -> None:
    if size > _LONGEST:
        raise RecordingError(f"a record of {size} bytes, at byte {reader.at}")
