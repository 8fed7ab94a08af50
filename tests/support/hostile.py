"""Bytes that are not what they seem: real packets cut, flipped, lengthened, and noise."""

from __future__ import annotations

from hypothesis import strategies as st

from nfq_agent.host.nfqueue.inbox import five_tuple_of
from nfq_agent.packet import TCP, UDP, Packet, PacketError
from nfq_agent.testing import tcp, udp

_V4 = "192.0.2.1:1024"
_V6 = "[2001:db8::1]:1024"
SEEDS = (
    tcp(_V4, "198.51.100.2:443", b"hello").payload,
    udp(_V4, "198.51.100.2:53", b"hello").payload,
    tcp(_V6, "[2001:db8::2]:443", b"hello").payload,
    udp(_V6, "[2001:db8::2]:53", b"hello").payload,
    # Hop-by-hop options, then a routing header, then a first fragment, then UDP.
    bytes.fromhex("6000000000280040") + bytes(32) + bytes.fromhex("2b00010400000000" "2c00000000000000" "1100000100000001")
    + bytes.fromhex("0400003500100000") + b"hello",
    # Options in IPv4.
    bytes.fromhex("4600002000000000401100000a0000010a00000201010101") + bytes.fromhex("04000035000c0000") + b"abcd",
)  # fmt: skip


def mutated(seed: bytes, cut: int, flips: list[tuple[int, int]], more: bytes) -> bytes:
    """A seed with some bytes set, cut short, and something added."""
    data = bytearray(seed)
    for place, value in flips:
        data[place % len(data)] = value
    return bytes(data[: len(data) - cut % (len(data) + 1)]) + more


mutants = st.builds(
    mutated,
    st.sampled_from(SEEDS),
    st.one_of(st.just(0), st.integers(0, 100)),
    st.lists(st.tuples(st.integers(0, 80), st.integers(0, 255)), max_size=6),
    st.one_of(st.just(b""), st.binary(max_size=60)),
)
packets = st.one_of(st.binary(max_size=200), mutants)


def check(data: bytes) -> None:
    """What must hold for the decoder, whatever the bytes are."""
    packet = Packet(data)
    try:
        headers = packet.headers
    except PacketError:
        assert "undecoded" in repr(packet)
        return
    five_tuple = headers.five_tuple
    assert (five_tuple.sport is None) == (five_tuple.dport is None)
    if five_tuple.sport is not None:
        # Ports are there, in the bytes, behind the IP header.
        assert headers.transport is not None
        ports = data[headers.transport : headers.transport + 4]
        assert ports == five_tuple.sport.to_bytes(2, "big") + (five_tuple.dport or 0).to_bytes(2, "big")
    assert headers.transport is None or headers.transport >= 20
    assert headers.data is None or headers.data <= len(data)
    assert len(packet.data) <= len(data)
    assert str(five_tuple)
    # What verdicts are known by stands for these very headers: the same protocol, addresses and ports, and no fragment.
    key = five_tuple_of(data)
    if key is not None and (not headers.length or headers.length >= len(data)):
        assert not headers.fragment
        assert five_tuple.protocol in (TCP, UDP)
        ports = (five_tuple.sport or 0).to_bytes(2, "big") + (five_tuple.dport or 0).to_bytes(2, "big")
        assert key == bytes((five_tuple.protocol,)) + five_tuple.src + five_tuple.dst + ports
