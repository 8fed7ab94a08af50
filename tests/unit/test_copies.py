"""Packets that are copies: two interfaces show one connection, the second of them late."""

from __future__ import annotations

import pytest
from conversations import segment
from flow_judges import judge

from nfq_agent.context import Context
from nfq_agent.packet import Hook, Packet
from nfq_agent.verdict import ACCEPT, WOULD_DROP, Verdict

CLIENT, SERVER = (b"\x0a\0\0\1", 40000), (b"\x0a\0\0\2", 80)
SYN, ACK, FIN = 2, 16, 1
REQUEST = b"GET / HTTP/1.1\r\nHost: www.good.test\r\n\r\n"


def said(flags: int, seq: int, stamp: int, data: bytes = b"") -> Packet:
    """A segment of the client with a timestamp."""
    options = b"\1\1\x08\n" + stamp.to_bytes(4, "big") + bytes(4)
    return Packet(segment(CLIENT, SERVER, flags, seq, 1, data, options), hook=Hook.PREROUTING, checksum_ready=False)


@pytest.mark.parametrize(("copies", "last"), [(False, WOULD_DROP), (True, ACCEPT)])
def test_the_second_copy_of_a_request_is_not_denied_for_coming_late(copies: bool, last: Verdict) -> None:
    bench = judge(["block-list"], monitor=True, context=Context(copies=copies))
    packets = [said(SYN, 0, 1), said(ACK, 1, 1, REQUEST), said(ACK | FIN, 1 + len(REQUEST), 2)]
    # The other interface's copy of the request, with a timestamp that its receiver takes for an old one.
    packets.append(packets[1])
    assert [bench.verdict(packet) for packet in packets] == [ACCEPT, ACCEPT, ACCEPT, last]


def test_a_denied_request_is_denied_in_both_copies() -> None:
    bench = judge(["block-list"], monitor=True, context=Context(copies=True))
    packets = [said(SYN, 0, 1), said(ACK, 1, 1, REQUEST.replace(b"good", b"bad"))]
    assert [bench.verdict(packet) for packet in (*packets, packets[1])] == [ACCEPT, WOULD_DROP, WOULD_DROP]
