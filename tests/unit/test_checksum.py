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


@given(
    st.sampled_from(["192.0.2.1:1 192.0.2.2:2", "[2001:db8::1]:1 [2001:db8::2]:2"]),
    st.sampled_from([tcp, udp]),
    st.binary(max_size=99),
    st.integers(0, 200),
    st.integers(0, 255),
)
def test_what_is_changed_on_the_way_is_wrong_in_each_form(ends: str, make: Any, data: bytes, place: int, bits: int) -> None:
    src, dst = ends.split()
    plain = make(src, dst, data).payload
    if plain[0] == 0x45:
        options = bytearray(bytes((0x46,)) + plain[1:20] + b"\1\1\1\1" + plain[20:])
        header = 24
    else:
        options = bytearray(plain[:6] + b"\x3c" + plain[7:40] + bytes((plain[6], 0, 1, 4, 0, 0, 0, 0)) + plain[40:])
        header = 48
    for packet, start in ((plain, len(plain) - len(options) + header), (mend(bytes(options)), header)):
        assert not is_wrong(Packet(packet))
        changed = bytearray(packet)
        # Behind the ports and the lengths, so that it stays the same kind of packet.
        at = (
            start + 16 + place % max(1, len(packet) - start - 16)
            if make is tcp
            else start + 6 + place % (len(packet) - start - 6)
        )
        changed[at] ^= bits
        none = make is udp and changed[start + 6 : start + 8] == b"\0\0"
        assert is_wrong(Packet(bytes(changed))) == (bits != 0 and not none)


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


def bent(packet: Packet, at: int, **more: Any) -> Packet:
    """The packet with one byte changed."""
    data = bytearray(packet.payload)
    data[at] ^= 0x55
    return Packet(bytes(data), **more)


@pytest.mark.parametrize("packet", PACKETS, ids=repr)
def test_a_changed_byte_is_seen_and_padding_is_none_of_the_packet(packet: Packet) -> None:
    start = packet.headers.transport or 0
    assert not is_wrong(packet)
    assert not is_wrong(Packet(packet.payload + b"\x55"))
    assert is_wrong(bent(packet, -1))
    assert is_wrong(bent(packet, start))
    # Behind the header of IPv4, whose own checksum does not cover it, or in the addresses of IPv6.
    assert is_wrong(bent(packet, start - 1))


def test_a_wrong_header_of_ipv4_is_seen_whatever_it_carries() -> None:
    whole = udp("192.0.2.1:1", "192.0.2.2:2", b"some")
    assert is_wrong(bent(whole, 8, gso=True))
    with_option = b"\x46" + whole.payload[1:20] + b"\1\1\1\1" + whole.payload[20:]
    mended = Packet(mend(with_option))
    assert not is_wrong(mended)
    assert is_wrong(bent(mended, 21))


@pytest.mark.parametrize("make", [tcp, udp])
@pytest.mark.parametrize("ends", [("192.0.2.1:1", "192.0.2.2:2"), ("[2001:db8::1]:1", "[2001:db8::2]:2")])
def test_what_is_not_known_is_not_wrong(make: Any, ends: tuple[str, str]) -> None:
    packet = make(*ends, b"data")
    assert is_wrong(bent(packet, -1))
    for unknown in ({"gso": True}, {"checksum_ready": False}, {"length": len(packet.payload) + 1}):
        assert not is_wrong(bent(packet, -1, **unknown))


def test_where_the_packet_ends_within_its_checksum_there_is_none_to_compare() -> None:
    cut = udp("[2001:db8::1]:1", "[2001:db8::2]:2", b"data").payload[:47]
    assert not is_wrong(Packet(cut[:4] + b"\0\7" + cut[6:]))


def test_a_fragment_and_no_checksum_are_not_wrong() -> None:
    whole = udp("192.0.2.1:1", "192.0.2.2:2", bytes(40)).payload
    for flags in (b"\x20\0", b"\0\x05"):
        fragment = whole[:6] + flags + whole[8:10] + b"\0\0" + whole[12:]
        fragment = fragment[:10] + internet_checksum(fragment[:20]).to_bytes(2, "big") + fragment[12:-1] + b"\x55"
        assert not is_wrong(Packet(fragment))
        assert not is_partial(Packet(fragment))
    none = Packet(whole[:26] + b"\0\0" + whole[28:-1] + b"\x55")
    assert not is_wrong(none)
    # A field of TCP that is zero is a checksum.
    segment = tcp("192.0.2.1:1", "192.0.2.2:2", b"data").payload
    assert is_wrong(Packet(segment[:36] + b"\0\0" + segment[38:]))
    # A protocol without a checksum that we know.
    other = tcp("192.0.2.1:1", "192.0.2.2:2", b"data").payload
    other = mend(other[:9] + b"\x2f" + other[10:])
    assert not is_wrong(Packet(other[:-1] + b"\x55"))
    assert not is_partial(Packet(other))


def test_the_sum_over_another_destination_is_not_known() -> None:
    plain = udp("[2001:db8::1]:1", "[2001:db8::2]:2", b"x").payload
    for left, known in ((1, False), (0, True)):
        routed = (
            plain[:4] + (len(plain) - 40 + 24).to_bytes(2, "big") + b"\x2b" + plain[7:40] + bytes((17, 2, 0, left)) + bytes(20)
        )
        packet = Packet(routed + plain[40:-1] + b"\x55")
        assert is_wrong(packet) == known
        assert is_wrong(Packet(routed + plain[40:])) is False


@pytest.mark.parametrize("size", [8, 16, 24])
def test_a_routing_header_is_found_behind_another(size: int) -> None:
    plain = udp("[2001:db8::1]:1", "[2001:db8::2]:2", b"x").payload
    options = bytes((43, size // 8 - 1)) + b"\1" + bytes((size - 4,)) + bytes(size - 4)
    for left in (0, 1):
        routed = options + bytes((17, 2, 0, left)) + bytes(20)
        packet = plain[:6] + b"\x3c" + plain[7:40] + routed + plain[40:]
        if left:
            with pytest.raises(PacketError, match="segments left"):
                mend(packet)
        else:
            assert not is_wrong(Packet(mend(packet)))
