"""Capture files: written by scapy in every form that is claimed, and cut or bent at every place."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded import write_ng
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import ARP, CookedLinux, CookedLinuxV2, Dot1AD, Dot1Q, Ether, Loopback
from scapy.layers.ppp import HDLC, PPP, PPPoE
from scapy.packet import Raw
from scapy.utils import PcapNgWriter, PcapWriter

from nfq_agent.capture.recording import Recorded, RecordingError, packets
from nfq_agent.testing import udp

V4 = IP(src="192.0.2.1", dst="192.0.2.2") / UDP(sport=1, dport=2) / Raw(b"abc")
V6 = IPv6(src="2001:db8::1", dst="2001:db8::2") / UDP(sport=1, dport=2) / Raw(b"abc")
# With its addresses: scapy asks the network for those that are missing, and waits two seconds for an answer.
ETHER = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
FRAMES = {
    "ethernet": (1, ETHER / V4),
    "ethernet-6": (1, ETHER / V6),
    "vlan": (1, ETHER / Dot1Q(vlan=7) / V4),
    "two-vlans": (1, ETHER / Dot1AD(vlan=7) / Dot1Q(vlan=8) / V6),
    "raw": (101, V4),
    "cooked": (113, CookedLinux(proto=0x0800) / V4),
    "cooked-2": (276, CookedLinuxV2(proto=0x86DD) / V6),
    "cooked-vlan": (113, CookedLinux(proto=0x8100) / Dot1Q(vlan=7, type=0x0800) / V4),
    "cooked-2-vlan": (276, CookedLinuxV2(proto=0x8100) / Dot1Q(vlan=7, type=0x86DD) / V6),
    "pppoe": (1, ETHER / PPPoE(sessionid=5) / PPP(proto=0x0021) / V4),
    "vlan-pppoe-6": (1, ETHER / Dot1Q(vlan=7) / PPPoE(sessionid=5) / PPP(proto=0x0057) / V6),
    "ppp": (9, PPP(proto=0x0021) / V4),
    "ppp-framed": (50, HDLC() / PPP(proto=0x0057) / V6),
    "ppp-compressed": (9, Raw(b"\x21") / V4),
    "loopback": (0, Loopback(type=2) / V4),
}


def recorded(data: bytes) -> list[Recorded]:
    return list(packets(io.BytesIO(data)))


def written(tmp_path: Path, link: int, *frames: Any, **form: Any) -> bytes:
    path = str(tmp_path / "capture")
    with PcapWriter(path, linktype=link, **form) as writer:
        for frame in frames:
            frame.time = 1700000000.25
            writer.write(frame)
    return Path(path).read_bytes()


@pytest.mark.parametrize("kind", FRAMES)
@pytest.mark.parametrize("form", [{}, {"endianness": ">"}, {"nano": True}])
def test_pcap_of_every_link_type(tmp_path: Path, kind: str, form: dict[str, Any]) -> None:
    link, frame = FRAMES[kind]
    (packet,) = recorded(written(tmp_path, link, frame, **form))
    inner = frame[IPv6] if IPv6 in frame else frame[IP]
    assert packet == Recorded(1700000000.25, bytes(inner), len(bytes(inner)), "")


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress, bz2.compress], ids=["gzip", "xz", "bzip2"])
def test_a_compressed_capture(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    plain = written(tmp_path, 101, *[V4] * 500)
    packed = compress(plain)
    assert recorded(packed) == recorded(plain)
    # As files that were joined are.
    assert recorded(compress(plain[:100]) + compress(plain[100:])) == recorded(plain)
    for broken in (packed[:-20], packed[:40], packed[:30] + b"xxxxxx" + packed[36:]):
        with pytest.raises(RecordingError, match="the compressed capture is broken at byte"):
            recorded(broken)


@pytest.mark.parametrize("size", range(5))
def test_a_compressed_file_of_a_few_bytes(size: int) -> None:
    with pytest.raises(RecordingError):
        recorded(b"\x1f\x8b\x08\x00\x00"[:size])


def test_a_link_type_that_is_not_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="packets of link type 105 are not read; allowed: Ethernet, Linux cooked, PPP"):
        recorded(written(tmp_path, 105, V4))


def test_a_frame_without_ip_has_no_payload(tmp_path: Path) -> None:
    first, second = recorded(written(tmp_path, 1, ETHER / ARP(), ETHER / V4))
    assert first.payload is None
    assert second.payload is not None


def test_pcapng_with_comments(tmp_path: Path) -> None:
    path = str(tmp_path / "capture.pcapng")
    frame = ETHER / V4
    frame.time = 1700000000.5
    frame.comment = b"OUTPUT drop out eth0"
    with PcapNgWriter(path) as writer:
        writer.write(frame)
    (packet,) = recorded(Path(path).read_bytes())
    assert packet == Recorded(1700000000.5, bytes(V4), len(bytes(V4)), "OUTPUT drop out eth0")


def block(order: str, kind: int, body: bytes) -> bytes:
    size = struct.pack(order + "I", len(body) + 12)
    return struct.pack(order + "I", kind) + size + body + size


@pytest.mark.parametrize("order", "<>")
def test_pcapng_of_both_byte_orders_with_nanoseconds_sections_and_simple_packets(order: str) -> None:
    section = block(order, 0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, 1, 0, -1))
    resolution = struct.pack(order + "HHB3xHH", 9, 1, 9, 0, 0)
    interface = block(order, 1, struct.pack(order + "HHI", 101, 0, 0) + resolution)
    data = bytes(V4)
    stamp = 1700000000 * 10**9 + 250_000_000
    head = struct.pack(order + "IIIII", 0, stamp >> 32, stamp & 0xFFFFFFFF, len(data), 1500)
    packet = block(order, 6, head + data + bytes(-len(data) % 4))
    old = block(
        order,
        2,
        struct.pack(order + "HHIIII", 0, 0, stamp >> 32, stamp & 0xFFFFFFFF, len(data), 1500) + data + bytes(-len(data) % 4),
    )
    simple = block(order, 3, struct.pack(order + "I", len(data)) + data + bytes(-len(data) % 4))
    unknown = block(order, 0xBAD, b"1234")
    whole = section + interface + unknown + packet + simple + section + interface + old
    timed = Recorded(1700000000.25, data, 1500, "")
    assert recorded(whole) == [timed, Recorded(0.0, data, len(data), ""), timed]
    with pytest.raises(RecordingError, match="not described"):
        recorded(section + packet)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("eth0", "eth0"), ("eth0.100", "eth0.100"), ("br-3a5b7c9d1e2f", "br-3a5b7c9d1e2f"), ("any", ""), ("anycast0", "anycast0"),
        ("nfqueue", ""), ("nflog:5", ""), ("-", ""), ("\\Device\\NPF_1", ""), ("two words", ""),
        ("sixteen-letters-", ""), ("", ""),
    ],
)  # fmt: skip
def test_the_interface_that_a_capture_names(tmp_path: Path, written: str, read: str) -> None:
    capture = write_ng(tmp_path / "capture", ["other0", written], [(1700000000.0, udp("192.0.2.1:1", "192.0.2.2:2"), 1, "")])
    (packet,) = recorded(capture.read_bytes())
    assert packet.interface == read


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not a capture"),
        (b"GIF89a", "not a capture"),
        (b"BZ, but no bzip2", "the compressed capture is broken at byte 0"),
        (
            b"\x28\xb5\x2f\xfd and more",
            r"it is compressed by zstd; decompress it first, as by `zstd -d FILE`",
        ),
        (
            struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 101) + struct.pack("<IIII", 0, 0, 1 << 30, 1),
            "1073741824 bytes",
        ),
        (struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 101) + b"half", "ends within a record"),
        (block("<", 0x0A0D0D0A, bytes(16)), "byte order"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(data: bytes, said: str) -> None:
    with pytest.raises(RecordingError, match=said):
        recorded(data)


@given(cut=st.integers(0, 300), at=st.integers(0, 300), value=st.integers(0, 255))
def test_no_file_raises_anything_else(cut: int, at: int, value: int) -> None:
    section = block("<", 0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1))
    packet = block("<", 6, struct.pack("<IIIII", 0, 1, 2, 32, 32) + bytes(V4)[:32] + struct.pack("<HH4sHH", 1, 4, b"text", 0, 0))
    data = bytearray(section + block("<", 1, struct.pack("<HHI", 101, 0, 0)) + packet + packet)
    if at < len(data):
        data[at] = value
    with contextlib.suppress(RecordingError):
        recorded(bytes(data[:cut]))
