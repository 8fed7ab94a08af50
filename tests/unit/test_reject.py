"""What is sent to those whose packets are refused: exactly what the RFCs say, with checksums that scapy agrees with."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach, IPv6

from nfq_agent.packet import Packet
from nfq_agent.reject import Allowance
from nfq_agent.reject import reject as reject_within
from nfq_agent.testing import icmp, ip_packet, tcp, udp
from nfq_agent.verdict import ACCEPT, REJECT, Action, Verdict

A, B = "192.0.2.1:40000", "198.51.100.1:443"
A6, B6 = "[2001:db8::1]:40000", "[2001:db8::2]:443"
FAMILIES = pytest.mark.parametrize(("a", "b", "layer"), [(A, B, IP), (A6, B6, IPv6)])


def reject(packet: Packet) -> Verdict:
    return reject_within(packet, Allowance())


def answers(packet: Packet) -> tuple[bytes, ...]:
    verdict = reject(packet)
    assert verdict.action is Action.DROP
    return verdict.inject


def sound(data: bytes, layer: type) -> Any:
    """The packet as scapy reads it; fails unless it builds the very bytes from it, lengths and checksums computed again."""
    read = layer(data)
    fresh = layer(data)
    for each in (fresh, *(fresh[kind] for kind in (TCP, UDP, ICMP, ICMPv6DestUnreach) if kind in fresh)):
        for field in ("len", "plen", "chksum", "cksum"):
            if field in each.fields and not (field == "len" and isinstance(each, UDP)):
                del each.fields[field]
        if isinstance(each, ICMP | ICMPv6DestUnreach):
            break
    assert bytes(fresh) == data
    return read


@FAMILIES
def test_a_syn_is_answered_with_reset_and_acknowledgement(a: str, b: str, layer: type) -> None:
    (data,) = answers(tcp(a, b, b"fast open", flags="S", seq=0xFFFFFFFF))
    reset = sound(data, layer)[TCP]
    assert (reset.sport, reset.dport, reset.seq, reset.ack, str(reset.flags)) == (443, 40000, 0, 9, "RA")
    assert (layer(data).src, layer(data).dst) == (layer(tcp(a, b).payload).dst, layer(tcp(a, b).payload).src)


@FAMILIES
def test_a_segment_resets_both_ends(a: str, b: str, layer: type) -> None:
    back, on = (sound(data, layer)[TCP] for data in answers(tcp(a, b, b"hello", seq=0x10000003, ack=0x70000001)))
    assert (back.sport, back.dport, back.seq, str(back.flags)) == (443, 40000, 0x70000001, "R")
    assert (on.sport, on.dport, on.seq, on.ack, str(on.flags)) == (40000, 443, 0x10000003, 0x70000001, "RA")


@FAMILIES
def test_a_fin_without_acknowledgement_counts_as_a_byte(a: str, b: str, layer: type) -> None:
    back = sound(answers(tcp(a, b, b"hello", seq=1000, flags="F"))[0], layer)[TCP]
    assert (back.seq, back.ack, str(back.flags)) == (0, 1006, "RA")


@FAMILIES
def test_a_reset_passes_and_is_never_answered(a: str, b: str, layer: type) -> None:
    assert reject(tcp(a, b, flags="R")) is ACCEPT
    for data in (*answers(tcp(a, b, b"x")), *answers(tcp(a, b, flags="S"))):
        assert reject(Packet(data)) is ACCEPT
    # With data it could carry something out.
    assert reject(tcp(a, b, b"data", flags="R")) is REJECT


def test_a_datagram_is_unreachable() -> None:
    packet = udp(A, B, b"x" * 2000)
    (data,) = answers(packet)
    error = sound(data, IP)
    assert (error.src, error.dst, error[ICMP].type, error[ICMP].code) == ("198.51.100.1", "192.0.2.1", 3, 3)
    assert len(data) == 576
    assert data[28:] == packet.payload[: 576 - 28]
    assert reject(Packet(data)) is ACCEPT


def test_a_datagram_is_unreachable_in_version_6() -> None:
    packet = udp(A6, B6, b"x" * 2000)
    (data,) = answers(packet)
    error = sound(data, IPv6)
    assert (error.src, error.dst, error[ICMPv6DestUnreach].code) == ("2001:db8::2", "2001:db8::1", 4)
    assert len(data) == 1280
    assert data[48:] == packet.payload[: 1280 - 48]
    assert reject(Packet(data)) is ACCEPT


def test_a_ping_is_prohibited() -> None:
    (data,) = answers(icmp("192.0.2.1", "198.51.100.1"))
    assert (sound(data, IP)[ICMP].type, IP(data)[ICMP].code) == (3, 13)
    (data,) = answers(icmp("2001:db8::1", "2001:db8::2"))
    assert sound(data, IPv6)[ICMPv6DestUnreach].code == 1


@pytest.mark.parametrize(
    "packet",
    [
        udp("192.0.2.1:1", "224.0.0.1:2", b"x"),
        udp("192.0.2.1:1", "255.255.255.255:2", b"x"),
        udp("0.0.0.0:68", "192.0.2.1:67", b"x"),
        udp("[2001:db8::1]:1", "[ff02::1]:2", b"x"),
        udp("[::]:1", "[2001:db8::1]:2", b"x"),
        icmp("192.0.2.1", "198.51.100.1", kind=11),
        icmp("2001:db8::1", "2001:db8::2", kind=3),
        icmp("2001:db8::1", "2001:db8::2", kind=137),
        Packet(bytes.fromhex("4500002200010001401100000102030401020305") + bytes(14)),
        Packet(b"\x45"),
    ],
)
def test_no_answer_where_the_rules_forbid_one(packet: Packet) -> None:
    """RFC 1122 3.2.2, RFC 4443 2.4 e: not about another error, a redirect, a later fragment, or what went to many."""
    assert reject(packet) is REJECT


@given(st.binary(max_size=200))
def test_no_bytes_make_it_raise(data: bytes) -> None:
    for head in (b"\x45", b"\x60"):
        reject(Packet(head + data))
    reject(Packet(ip_packet(b"\1\2\3\4", b"\1\2\3\5", data[0] if data else 0, data)) if len(data) > 60 else Packet(data))


def test_errors_are_limited_as_the_kernel_limits_its_own() -> None:
    allowance = Allowance()

    def sent(source: str, now: float, times: int = 1) -> int:
        packet = udp(source, B, b"x", time=now)
        return sum(len(reject_within(packet, allowance).inject) for _ in range(times))

    assert sent(A, 1.0, times=1000) == 6
    assert sent(A, 3.0, times=1000) == 2
    assert sent("192.0.2.9:1", 3.0) == 1
    # From many sources at once: 50, less what was sent at this moment.
    assert 40 < sum(sent(f"10.0.{n >> 8}.{n & 255}:1", 3.0) for n in range(1000)) <= 50
    assert reject_within(udp(A, B, b"x", time=3.0), allowance).word == "reject"


def test_resets_are_not_limited() -> None:
    allowance = Allowance()
    assert all(reject_within(tcp(A, f"198.51.100.1:{port}", flags="S", time=1.0), allowance).inject for port in range(1, 500))


@FAMILIES
@pytest.mark.parametrize("make", [tcp, udp])
def test_no_answer_to_a_wrong_checksum(a: str, b: str, layer: type, make: Any) -> None:
    good = make(a, b, b"hello")
    assert reject(good).inject
    broken = good.payload[:-1] + b"!"
    assert reject(Packet(broken)) is REJECT
    # Nothing is known where an offload fills it in later, or where the end was not copied.
    assert reject(Packet(broken, checksum_ready=False)).inject
    assert reject(Packet(broken, length=2000)).inject
