"""The decoder over real, odd and hostile bytes: it says what is there, makes up nothing, and raises only its own error."""

from __future__ import annotations

import socket

import pytest
from examples import EXAMPLES
from hostile import SEEDS, check, packets
from hypothesis import given, settings

from nfq_agent.packet import TCP, UDP, FiveTuple, Hook, PacketError, decode, endpoint, hook_name, protocol_name
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
