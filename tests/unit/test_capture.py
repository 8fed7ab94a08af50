"""What a tap takes: the classic filter beside its selection, the interfaces that are followed, lines with descriptors."""

from __future__ import annotations

import os
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfq_agent.capture.following import Follower, Table
from nfq_agent.capture.handing import Handed, give, make_room
from nfq_agent.capture.selection import CaptureSelection, classic_filter
from nfq_agent.config.capture import MOST_RANGES
from nfq_agent.host.links import Link
from nfq_agent.packet import decode
from nfq_agent.testing import tcp, udp


def run_filter(program: bytes, frame: bytes) -> int:
    """What the kernel's interpreter of classic filters does, for the instructions in use (net/core/filter.c)."""
    code = [struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8)]
    a = x = at = 0
    memory = [0] * 16
    while True:
        operation, true, false, k = code[at]
        at += 1
        if operation in (0x28, 0x30, 0x48, 0x50):
            start = k + (x if operation & 0x40 else 0)
            size = 1 if operation & 0x10 else 2
            if start + size > len(frame):
                return 0
            a = int.from_bytes(frame[start : start + size], "big")
        elif operation == 0x01:
            x = k
        elif operation == 0x07:
            x = a
        elif operation == 0xB1:
            if k >= len(frame):
                return 0
            x = (frame[k] & 15) * 4
        elif operation == 0x02:
            memory[k] = a
        elif operation == 0x60:
            a = memory[k]
        elif operation in (0x04, 0x0C, 0x64):
            a = {0x04: a + k, 0x0C: a + x, 0x64: a << k}[operation] & 0xFFFFFFFF
        elif operation == 0x05:
            at += k
        elif operation == 0x06:
            return int(k)
        else:
            holds = {0x15: a == k, 0x25: a > k, 0x35: a >= k, 0x45: bool(a & k)}[operation]
            at += true if holds else false


def framed(packet: bytes) -> bytes:
    return b"\x02" * 12 + (b"\x08\x00" if packet[0] >> 4 == 4 else b"\x86\xdd") + packet


RANGES = st.lists(st.tuples(st.integers(1, 65535), st.integers(1, 65535)).map(lambda pair: (min(pair), max(pair))), max_size=20)
PORTS = st.integers(0, 65535)


@given(RANGES, RANGES, PORTS, PORTS, st.booleans(), st.booleans())
def test_the_filter_takes_what_the_selection_takes(
    tcp_ranges: list[tuple[int, int]], udp_ranges: list[tuple[int, int]], sport: int, dport: int, v6: bool, is_tcp: bool
) -> None:
    selection = CaptureSelection(("*",), (), tuple(tcp_ranges), tuple(udp_ranges))
    ends = ("[fd00::1]", "[fd00::2]") if v6 else ("10.0.0.1", "10.0.0.2")
    make = tcp if is_tcp else udp
    packet = make(f"{ends[0]}:{sport}", f"{ends[1]}:{dport}").payload
    taken = run_filter(classic_filter(selection, 99), framed(packet))
    assert taken == (99 if selection.takes(decode(packet).five_tuple) else 0)


def extended(kinds: list[tuple[int, int]], protocol: int, rest: bytes) -> bytes:
    """An IPv6 packet with extension headers. kinds: number and length of each, in units of 8 bytes after the first 8."""
    numbers = [number for number, _ in kinds] + [protocol]
    headers = b"".join(
        bytes((numbers[place + 1], length)) + b"\1\4" + bytes(4) + bytes(8 * length) for place, (_, length) in enumerate(kinds)
    )
    return struct.pack("!IHBB16s16s", 6 << 28, len(headers + rest), numbers[0], 64, b"\xfd" * 16, b"\xfe" * 16) + headers + rest


EXTENSIONS = st.lists(st.tuples(st.sampled_from([0, 43, 60, 135, 139, 140]), st.integers(0, 3)), min_size=1, max_size=3)


@given(EXTENSIONS, st.sampled_from([6, 17, 58, 89]), st.sampled_from([80, 81]))
def test_the_filter_reads_through_extension_headers(kinds: list[tuple[int, int]], protocol: int, port: int) -> None:
    selection = CaptureSelection(("*",), (), ((80, 80),), ((80, 80),))
    packet = extended(kinds, protocol, struct.pack("!HHHHIBBHHH", 9, port, 20, 0, 0, 0x50, 2, 0, 0, 0))
    taken = run_filter(classic_filter(selection, 99), framed(packet))
    assert taken == (99 if selection.takes(decode(packet).five_tuple) else 0)


def test_more_extension_headers_than_the_filter_reads_come_through() -> None:
    program = classic_filter(CaptureSelection(("*",), (), ((80, 80),)), 99)
    assert run_filter(program, framed(extended([(60, 0)] * 4, 6, bytes(20)))) == 99


def test_a_listener_report_is_not_lost_in_a_full_ring() -> None:
    """A report (MLDv2, RFC 3810) has a hop-by-hop header: it came through the filter, and was counted where the ring was full."""
    report = extended([(0, 0)], 58, b"\x8f\0\0\0\0\0\0\1\4\0\0\0\xff\2" + bytes(13) + b"\2")
    assert run_filter(classic_filter(CaptureSelection(("*",), (), (), ((9, 9),)), 99), framed(report)) == 0


def test_what_the_filter_can_not_read_comes_through() -> None:
    program = classic_filter(CaptureSelection(("*",), (), ((80, 80),)), 99)
    packet = tcp("10.0.0.1:1", "10.0.0.2:2").payload
    assert run_filter(program, framed(packet)) == 0
    later = bytearray(packet)
    later[6:8] = b"\x00\x10"
    assert run_filter(program, framed(bytes(later))) == 99
    assert run_filter(program, b"\x02" * 12 + b"\x81\x00\x00\x05\x08\x00" + packet) == 99
    assert run_filter(program, b"\x02" * 12 + b"\x08\x06" + bytes(28)) == 0
    fragment = bytearray(tcp("[fd00::1]:1", "[fd00::2]:2").payload)
    fragment[6] = 44
    assert run_filter(program, framed(bytes(fragment))) == 99


def test_the_longest_filter_fits_into_the_kernel() -> None:
    ranges = tuple((port, port) for port in range(1, MOST_RANGES + 1))
    assert len(classic_filter(CaptureSelection(("*",), (), ranges[:75], ranges[75:]), 99)) // 8 <= 4096


def link(index: int, name: str) -> Link:
    return Link(index, name, "veth", 1500, True, "", 0, None, 0, False)


NAMES = st.sampled_from(["veth1", "veth2", "vethmgmt", "eth0", "cali9"])
CHANGES = st.lists(st.tuples(st.integers(1, 6), NAMES, st.booleans()), max_size=40)


@given(CHANGES, st.integers(1, 4))
def test_exactly_the_chosen_interfaces_are_followed(changes: list[tuple[int, str, bool]], rows: int) -> None:
    follower = Follower(CaptureSelection(("veth*", "cali*"), ("vethmgmt",)), rows)
    followed: set[int] = set()
    names: dict[int, str] = {}
    for index, name, gone in changes:
        come, left = follower.change(link(index, name), gone)
        names.pop(index, None) if gone else names.update({index: name})
        if come is not None:
            assert index not in followed
            followed.add(index)
        if left is not None:
            followed.remove(index)
        assert followed == set(follower.followed)
        chosen = {index for index, name in names.items() if name.startswith(("veth", "cali")) and name != "vethmgmt"}
        assert followed <= chosen
        assert len(followed) <= rows
        if rows >= 6:
            assert followed == chosen
        assert len({each.row for each in follower.followed.values()}) == len(followed)
    # A listing puts right what was missed.
    follower.resume([link(9, "veth2")])
    assert set(follower.followed) == {9}


def test_a_row_is_used_again_as_late_as_can_be() -> None:
    follower = Follower(CaptureSelection(("veth*",)), 3)
    come, _ = follower.change(link(1, "veth1"), False)
    assert come is not None
    follower.change(link(1, "veth1"), True)
    later, _ = follower.change(link(2, "veth2"), False)
    assert later is not None
    assert later.row != come.row


def test_table() -> None:
    table = Table(("a", "b"), 2)
    table.add(1, "b", 3)
    assert (table.read(0), table.read(1)) == ({"a": 0, "b": 0}, {"a": 0, "b": 3})
    table.clear(1)
    assert table.read(1) == {"a": 0, "b": 0}


def test_descriptors_come_with_their_lines() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    got: list[tuple[object, ...]] = []
    with ours, theirs:
        handed = Handed(theirs, {"add": (1, lambda *words: got.append(words)), "gone": (0, lambda *words: got.append(words))})
        reader, writer = os.pipe()
        make_room(ours)
        for number in range(100):
            give(ours, f"add {number}", [reader])
        give(ours, "gone 7", [])
        ours.send(b"stop\n")
        assert handed.recv(10, socket.MSG_DONTWAIT) == b"stop\n"
        assert [words[-1] for words in got] == [*map(str, range(100)), "7"]
        for words in got[:100]:
            descriptor = words[0]
            assert isinstance(descriptor, int)
            assert os.fstat(descriptor).st_ino == os.fstat(reader).st_ino
            os.close(descriptor)
        assert handed.recv(10, socket.MSG_DONTWAIT) == b"\n"
        give(ours, "lost 1", [reader])
        assert handed.recv(10, socket.MSG_DONTWAIT) == b"lost 1\n"
        handed.close()
        ours.close()
        assert handed.recv(10, socket.MSG_DONTWAIT) == b""
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize(("name", "chosen"), [("veth1", True), ("vethmgmt", False), ("eth0", False), ("lo", False)])
def test_patterns(name: str, chosen: bool) -> None:
    assert CaptureSelection(("veth*", "cali*"), ("vethmgmt",)).chooses(name) is chosen
