"""The decoder over real, odd and hostile bytes: it says what is there, makes up nothing, and raises only its own error."""

from __future__ import annotations

import socket
import struct
from random import Random

import pytest
from examples import EXAMPLES
from hostile import SEEDS, check, packets
from hypothesis import given, settings

from nfq_agent.packet import TCP, UDP, FiveTuple, Headers, Hook, Packet, PacketError, decode, endpoint, hook_name, protocol_name
from nfq_agent.testing import tcp, udp
from nfq_agent.verdict import VerdictError


def test_tcp_and_udp_of_both_families() -> None:
    for packet, protocol, version in (
        (tcp("192.0.2.1:1024", "198.51.100.2:443", b"hello"), TCP, 4),
        (udp("192.0.2.1:1024", "198.51.100.2:443", b"hello"), UDP, 4),
        (tcp("[2001:db8::1]:1024", "[2001:db8::2]:443", b"hello"), TCP, 6),
        (udp("[2001:db8::1]:1024", "[2001:db8::2]:443", b"hello"), UDP, 6),
    ):
        headers = packet.headers
        assert (headers.version, headers.five_tuple.protocol) == (version, protocol)
        assert (headers.five_tuple.sport, headers.five_tuple.dport) == (1024, 443)
        assert packet.data == b"hello"
        assert not headers.fragment
        assert headers.five_tuple.reversed().reversed() == headers.five_tuple


def test_extension_headers_are_walked_and_options_skipped() -> None:
    headers = decode(SEEDS[4])
    assert headers.five_tuple.protocol == UDP
    assert headers.five_tuple.dport == 53
    assert headers.fragment
    assert decode(SEEDS[5]).five_tuple.dport == 53


def test_a_later_fragment_has_no_port() -> None:
    packet = bytearray(udp("192.0.2.1:1024", "198.51.100.2:53", b"12345678").payload)
    packet[6:8] = (185).to_bytes(2, "big")
    headers = decode(bytes(packet))
    assert headers.fragment
    assert (headers.five_tuple.sport, headers.five_tuple.dport, headers.transport) == (None, None, None)
    packet[6:8] = b"\x20\0"
    assert decode(bytes(packet)).five_tuple.dport == 53


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no bytes"),
        (b"\x45" + bytes(10), "IPv4 header cut at 11"),
        (b"\x41" + bytes(30), "IPv4 header length 4"),
        (b"\x10" + bytes(60), "IP version 1"),
        (b"\x60" + bytes(30), "IPv6 header cut at 31"),
        (SEEDS[1][:22], "udp header cut"),
        (SEEDS[4][:44], "extension header"),
    ],
)
def test_what_does_not_hold_together_is_named(data: bytes, reason: str) -> None:
    with pytest.raises(PacketError, match=reason):
        decode(data)


@settings(max_examples=EXAMPLES * 5)
@given(packets)
def test_hostile_bytes_raise_nothing_but_its_own_error(data: bytes) -> None:
    check(data)


def test_the_quick_way_reads_what_the_general_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    random = Random(14)
    samples: list[bytes] = []
    for _ in range(3000):
        data = bytearray(random.randbytes(random.choice((39, 40, 41, 44, 60, 80))))
        data[0], data[9], data[32] = 0x45, random.choice((TCP, TCP, TCP, UDP)), random.choice((0x40, 0x50, 0x50, 0x80, 0xF0))
        data[2:4] = random.choice((0, 19, 20, 39, 40, 41, 60, 80, 1500)).to_bytes(2, "big")
        data[6:8] = random.choice((0, 0x4000, 0x2000, 1, 0xFFFF)).to_bytes(2, "big")
        samples.append(bytes(data))

    def read(data: bytes) -> Headers | str:
        try:
            return decode(data)
        except PacketError as error:
            return str(error)

    quick = [read(data) for data in samples]
    assert any(isinstance(each, Headers) and each.data == 40 for each in quick)
    monkeypatch.setattr("nfq_agent.packet._decode_plain", lambda _: None)
    assert [read(data) for data in samples] == quick


def test_names() -> None:
    assert protocol_name(6) == "tcp"
    assert protocol_name(253) == "proto-253"
    assert hook_name(Hook.FORWARD) == "FORWARD"
    assert hook_name(9) == "HOOK-9"
    assert endpoint(socket.inet_aton("192.0.2.1"), 80) == "192.0.2.1:80"
    assert endpoint(socket.inet_pton(socket.AF_INET6, "2001:db8::1"), 80) == "[2001:db8::1]:80"
    assert str(FiveTuple(1, bytes(4), None, bytes(4), None)) == "icmp 0.0.0.0 -> 0.0.0.0"


def test_a_packet_from_no_queue_takes_no_verdict() -> None:
    packet = tcp("192.0.2.1:1024", "198.51.100.2:443")
    for answer in (packet.accept, packet.drop, packet.repeat, lambda: packet.requeue(3)):
        with pytest.raises(VerdictError, match="waits for no verdict"):
            answer()
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = packet.no_such_thing  # type: ignore[attr-defined]  # that is the mistake


def _ipv4(length: int, protocol: int = 59, payload: bytes = b"") -> bytes:
    return struct.pack("!BBHHHBBH4s4s", 0x45, 0, length, 0, 0, 64, protocol, 0, bytes(4), bytes(4)) + payload


def test_the_shortest_headers_are_decoded_and_one_byte_less_is_not() -> None:
    assert Packet(_ipv4(20)).headers.five_tuple.protocol == 59
    for cut in (Packet(_ipv4(20)[:19]), Packet(_ipv4(19))):
        with pytest.raises(PacketError):
            cut.headers  # noqa: B018  # it decodes
    # A destination-options header whose two first bytes are the last of the copy: the next header is not there any more.
    fixed = struct.pack("!IHBB16s16s", 6 << 28, 8, 60, 64, bytes(16), bytes(16))
    assert Packet(fixed + bytes((59, 0))).headers.five_tuple.protocol == 59
    with pytest.raises(PacketError, match="extension header 60 cut at 41 bytes"):
        Packet(fixed + bytes((59,))).headers  # noqa: B018  # it decodes


def test_the_flags_of_a_tcp_header_that_was_cut_behind_them() -> None:
    tcp_header = struct.pack("!HHIIBB", 1, 2, 0, 0, 5 << 4, 2)
    assert Packet(_ipv4(40, 6, tcp_header)).headers.tcp_flags == 2
    assert Packet(_ipv4(40, 6, tcp_header[:13])).headers.tcp_flags is None
