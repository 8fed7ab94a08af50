"""Checksums against the RFC's example, a slow sum and scapy."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfq_agent.checksum import internet_checksum, is_partial, is_wrong, mend
from nfq_agent.packet import Packet, PacketError
from nfq_agent.testing import icmp, tcp, udp


def test_the_example_of_rfc_1071() -> None:
    assert internet_checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0xFFFF - 0xDDF2


def slow(data: bytes) -> int:
    if len(data) & 1:
        data += b"\0"
    total = sum(int.from_bytes(data[at : at + 2], "big") for at in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


@given(st.binary(max_size=64).filter(any))
def test_as_the_sum_word_by_word(data: bytes) -> None:
    assert internet_checksum(data) == slow(data)


@given(st.binary(max_size=120))
def test_any_bytes_are_mended_or_refused(data: bytes) -> None:
    try:
        mended = mend(data)
    except PacketError:
        return
    assert mend(mended) == mended
    assert len(mended) == len(data)


PACKETS = [
    tcp("192.0.2.1:1", "192.0.2.2:2", b"odd"), tcp("[2001:db8::1]:1", "[2001:db8::2]:2", b"even"),
    udp("192.0.2.1:1", "192.0.2.2:2", b"some"), udp("[2001:db8::1]:1", "[2001:db8::2]:2", b"x"),
    icmp("192.0.2.1", "192.0.2.2", b"ping"), icmp("2001:db8::1", "2001:db8::2", b"ping"),
]  # fmt: skip


@pytest.mark.parametrize("packet", PACKETS, ids=repr)
def test_a_changed_byte_and_a_changed_length(packet: object) -> None:
    payload = packet.payload  # type: ignore[attr-defined]  # parametrize gives objects
    for changed in (payload[:-1] + bytes((payload[-1] ^ 0x55,)), payload + b"longer", payload[:-1]):
        mended = mend(changed)
        assert mended != changed
        assert len(mended) == len(changed)
        assert mend(mended) == mended


def test_no_udp_checksum_over_ipv4_stays_none() -> None:
    payload = bytearray(udp("192.0.2.1:1", "192.0.2.2:2", b"some").payload)
    payload[26:28] = b"\0\0"
    assert mend(bytes(payload))[26:28] == b"\0\0"


def test_what_can_not_be_mended_is_refused() -> None:
    fragment = bytearray(udp("192.0.2.1:1", "192.0.2.2:2", bytes(40)).payload)
    fragment[6:8] = b"\x20\x00"
    with pytest.raises(PacketError, match="fragment"):
        mend(bytes(fragment))
    with pytest.raises(PacketError, match="65535"):
        mend(bytes(fragment) + bytes(70000))
    routed = bytes((17, 2, 0, 1)) + bytes(20)
    plain = udp("[2001:db8::1]:1", "[2001:db8::2]:2", b"x").payload
    with pytest.raises(PacketError, match="segments left"):
        mend(plain[:6] + b"\x2b" + plain[7:40] + routed + plain[40:])


@pytest.mark.parametrize("make", [tcp, udp])
@pytest.mark.parametrize("ends", [("192.0.2.1:1", "192.0.2.2:2"), ("[2001:db8::1]:1", "[2001:db8::2]:2")])
def test_a_checksum_that_an_offload_completes_is_told_from_a_wrong_one(make: Any, ends: tuple[str, str]) -> None:
    right = make(*ends, b"payload")
    assert not is_partial(right)
    headers = right.headers
    start, length = headers.transport, len(right.payload) - headers.transport
    words = headers.five_tuple.src + headers.five_tuple.dst + struct.pack("!II", length, headers.five_tuple.protocol)
    # As the kernel adds it up, word by word with the carry (csum_tcpudp_nofold() and csum_fold(), lib/checksum.c).
    total = sum(struct.unpack(f"!{len(words) // 2}H", words))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    at = start + (16 if headers.five_tuple.protocol == 6 else 6)
    left = Packet(right.payload[:at] + total.to_bytes(2, "big") + right.payload[at + 2 :])
    assert is_partial(left)
    assert is_wrong(left)
    assert not is_partial(Packet(right.payload[:at] + (total ^ 1).to_bytes(2, "big") + right.payload[at + 2 :]))
