"""The compiled reader, message by message: what it finds is what the whole parse finds, whatever the bytes are."""

from __future__ import annotations

import time
from struct import Struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from queue_messages import message, messages, sorted_out

from nfq_agent.host.attributes import attribute
from nfq_agent.host.nfqueue.inbox import five_tuple_of


def parsed(data: bytes) -> dict[int, bytes] | None:
    """The attributes of a packet's message by kind, parsed independently; None if the message is not a packet."""
    if len(data) < 32 or data[4:6] != b"\0\3":
        return None
    found: dict[int, bytes] = {}
    offset = 20
    while offset + 4 <= len(data):
        length, kind = Struct("=HH").unpack_from(data, offset)
        if length < 4 or offset + length > len(data):
            break
        found[kind & 0x3FFF] = data[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found if 1 in found else None


broken_messages = st.builds(
    lambda whole, cut, flips: bytes(
        byte ^ dict(flips).get(place, 0) for place, byte in enumerate(whole[: max(0, len(whole) - cut)])
    ),
    messages,
    st.integers(0, 300),
    st.lists(st.tuples(st.integers(0, 119), st.integers(0, 255)), max_size=3),
)


@given(messages | broken_messages)
def test_it_finds_what_the_whole_parse_finds(data: bytes) -> None:
    expected = parsed(data)
    count, asked = sorted_out(data)
    # It requires that the packet header comes first, as the kernel has it.
    if count == 0:
        assert expected is None or data[22:24] != b"\1\0"
        return
    assert expected is not None
    ((packet, key),) = asked
    assert packet.id == int.from_bytes(data[24:28], "big")

    def number(kind: int) -> int | None:
        return int.from_bytes(expected[kind][:4], "big") if len(expected.get(kind, b"")) >= 4 else None

    header = expected[1]
    if len(header) >= 7:
        assert (packet.hw_protocol, packet.hook) == (int.from_bytes(header[4:6], "big"), header[6])
    assert packet.payload == expected.get(10, b"")
    length = number(13)
    assert packet.length == (len(packet.payload) if length is None else length)
    assert packet.gso is bool((number(14) or 0) & 2)
    assert packet.mark == (number(3) or 0)
    assert [packet.indev, packet.outdev, packet.physindev, packet.physoutdev] == [number(kind) or 0 for kind in (5, 6, 7, 8)]
    assert (packet.uid, packet.gid) == (number(16), number(17))
    if len(hardware := expected.get(9, b"")) >= 12:
        assert packet.hw_address == hardware[4 : 4 + min(8, int.from_bytes(hardware[:2], "big"))]
    else:
        assert packet.hw_address is None
    if len(stamp := expected.get(4, b"")) >= 16:
        assert packet.time == int.from_bytes(stamp[:8], "big") + int.from_bytes(stamp[8:16], "big") / 1e6
    else:
        assert abs(packet.time - time.time()) < 60
    plain = five_tuple_of(packet.payload)
    if plain is None:
        assert key is None
    else:
        assert key == bytes((packet.hook,)) + packet.indev.to_bytes(4, "big") + packet.outdev.to_bytes(4, "big") + plain


def test_whatever_differs_in_place_or_flow_has_a_key_of_its_own() -> None:
    def ipv4(protocol: int = 17, ends: bytes = bytes(range(12))) -> bytes:
        return b"\x45\0\0\x40\0\0\x40\0\x40" + bytes((protocol,)) + b"\0\0" + ends + bytes(8)

    def ipv6(protocol: int = 17, ends: bytes = bytes(range(36))) -> bytes:
        return b"\x60\0\0\0\0\x10" + bytes((protocol,)) + b"\x40" + ends + bytes(12)

    several = [message(ipv4()), message(ipv4(6)), message(ipv6()), message(ipv6(6))]
    several += [message(ipv4(), hook=1), message(ipv4(), indev=1), message(ipv4(), outdev=1), message(ipv4(), indev=1, outdev=1)]
    several += [message(ipv4(ends=bytes(range(at)) + b"\xff" + bytes(range(at + 1, 12)))) for at in range(12)]
    several += [message(ipv6(ends=bytes(range(at)) + b"\xff" + bytes(range(at + 1, 36)))) for at in range(36)]
    count, asked = sorted_out(*several)
    assert count == len(several)
    assert len({key for _, key in asked}) == len(several)
    # What a flow's packets differ in is not in it: identification, time to live, length, and who sent them.
    same = [message(ipv4(), identity=7), message(ipv4()[:4] + b"\1\2" + ipv4()[6:]), message(ipv4() + b"more")]
    same.append(message(ipv4(), more=attribute(16, bytes(4))))
    _, again = sorted_out(message(ipv4()), *same)
    assert len({key for _, key in again}) == 1


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x45" * 23,
        b"\x46\0\0\x40\0\0\0\0\x40\x11" + bytes(30),
        b"\x45\0\0\x40\0\0\x20\0\x40\x11" + bytes(30),
        b"\x45\0\0\x40\0\0\0\1\x40\x11" + bytes(30),
        b"\x45\0\0\x40\0\0\0\0\x40\x01" + bytes(30),
        b"\x60\0\0\0\0\x10\x2c\x40" + bytes(50),
        b"\x60\0\0\0\0\x10\x11\x40" + bytes(35),
    ],
    ids=["empty", "short", "options", "first fragment", "later fragment", "icmp", "v6 fragment", "v6 without ports"],
)
def test_what_is_not_plain_has_no_key(payload: bytes) -> None:
    _, asked = sorted_out(message(payload))
    assert [key for _, key in asked] == [None]


def test_what_is_no_packet_is_passed_over() -> None:
    count, asked = sorted_out(b"", b"x", message(b"", kind=2), message(b"")[:31], message(b"", identity=5), bytes(64))
    assert count == 1
    assert [packet.id for packet, _ in asked] == [5]
