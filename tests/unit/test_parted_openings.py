"""A ClientHello in several segments: where it is accepted it is never shown, and what is known of it is the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import pytest
from flow_judges import judge, quick
from hypothesis import example, given
from hypothesis import strategies as st
from openings import client_hello, made_hello, numbers, server_name
from tcp_openings import CLIENT, HELLO, REST, SERVER, found, segments, start

from nfq_agent.checksum import mend
from nfq_agent.context import Context
from nfq_agent.elements.dpi import Dpi
from nfq_agent.flow_memory import SIZE, FlowMemory
from nfq_agent.flow_table import FlowTable
from nfq_agent.openings import Openings, name_in_opening
from nfq_agent.packet import Packet
from nfq_agent.policy_memory import UNFINISHED
from nfq_agent.testing import tcp
from nfq_agent.verdict import ACCEPT, DROP, Action, Verdict

BAD: Final = client_hello("www.bad.test", alpn=("h2", "http/1.1"))
KEPT: Final = Verdict(Action.REPEAT, mark=0x4E000000, means=Action.ACCEPT)


@pytest.mark.parametrize("pieces", range(2, 9))
def test_a_hello_in_a_few_segments_is_never_shown(pieces: int) -> None:
    memory = FlowMemory(memoryview(bytearray(SIZE)), bytes(16))
    _, table = quick(memory=memory)
    packets = segments(HELLO, range(60, 60 * pieces, 60))
    assert len(packets) == pieces
    assert {found(table, packet) for packet in [*start(), *packets[:-1]]} == {ACCEPT}
    known = memory.recall(packets[0].headers.five_tuple)
    assert known is not None
    assert known[1] == {"protocol": "tls", "dpi": "gave-up", "conflict": UNFINISHED}
    end = 6 + len(HELLO)
    behind = [packets[-1], tcp(SERVER, CLIENT, b"x" * 50, seq=10, ack=end), tcp(CLIENT, SERVER, REST, seq=end, ack=60)]
    assert {found(table, packet) for packet in behind} == {ACCEPT}
    known = memory.recall(packets[0].headers.five_tuple)
    assert known is not None
    assert known[1]["tls_sni"] == "www.good.test"


@pytest.mark.parametrize(
    ("names", "message", "cuts"),
    [
        (["allow-list"], HELLO, range(50, 450, 50)),
        (["allow-list"], HELLO, [9]),
        (["impatient"], HELLO, [100, 200]),
        (["tls-alone"], HELLO, [100]),
        (["allow-list"], HELLO[:9] + b"\2" + HELLO[10:], [100]),
        (["allow-list"], made_hello([1] * 2500, [server_name(b"www.good.test")]), [2000, 4000]),
    ],
    ids=["nine", "short", "impatient", "by-protocol", "version", "long"],
)
def test_what_is_not_plain_is_shown(names: list[str], message: bytes, cuts: Sequence[int]) -> None:
    whole = judge(names)
    judged, table = quick(names)
    shown = 0
    for packet in start() + segments(message, cuts):
        whole.now = judged.now = 1.0
        got = found(table, packet)
        shown += got is None
        assert (got or judged.verdict(packet)) == whole.verdict(packet)
    assert shown


def test_a_denied_name_in_several_segments_is_denied() -> None:
    judged, table = quick()
    *before, last = start() + segments(BAD, [100, 300])
    assert {found(table, packet) for packet in before} == {ACCEPT}
    assert found(table, last) is None
    assert judged.verdict(last) is DROP
    # Nor does it pass when it is sent again.
    assert found(table, last) is None
    assert judged.verdict(last) is DROP


def events(message: bytes, cuts: Sequence[int], what: Sequence[tuple[int, int]]) -> Iterator[tuple[float, Packet]]:
    """The packets of a connection with others between them: (number of the packet, kind)."""
    now = 1.0
    packets = start() + segments(message, cuts)
    end = 6 + len(message)
    behind = [tcp(SERVER, CLIENT, b"x" * 50, seq=10, ack=end), tcp(CLIENT, SERVER, REST, seq=end, ack=60)]
    for number, packet in enumerate([*packets, *behind]):
        for at, kind in what:
            if 3 + at != number:
                continue
            offset = 6 + sum(len(each.data) for each in packets[:number])
            other = packets[min(number, len(packets) - 1)].data
            flags = {6: "FA", 7: "RA", 8: "PUA", 9: "P"}.get(kind, "PA")
            if kind < 4:
                now += (0.5, 9.9, 10.1, 4.0)[kind]
            elif kind == 4:
                yield now, tcp(SERVER, CLIENT, flags="A", seq=10, ack=offset)
            elif kind == 5:
                yield now, tcp(CLIENT, SERVER, flags="A", seq=offset, ack=10)
            elif kind < 10:
                yield now, tcp(CLIENT, SERVER, other if kind != 6 else b"", flags=flags, seq=offset, ack=10)
            elif kind == 10:
                # Other bytes with the numbers of those that came, or of those that come.
                yield now, tcp(CLIENT, SERVER, bytes(len(other)), seq=max(6, offset - len(other)), ack=10)
            elif kind == 11:
                yield now, tcp(CLIENT, SERVER, other, seq=offset + 7, ack=10)
            elif kind == 12:
                yield now, tcp(SERVER, CLIENT, b"\x16\3\3\0\4\2\0\0\0", seq=10, ack=offset)
            elif kind == 13:
                yield now, tcp(CLIENT, SERVER, flags="S", seq=5 if at % 2 else 900)
            elif kind == 14:
                yield now, tcp(SERVER, CLIENT, flags="SA", seq=9, ack=6)
            elif kind == 15:
                # A decoy: its receiver discards it.
                decoy = bytearray(mend(tcp(CLIENT, SERVER, other[::-1], seq=offset, ack=10).payload))
                decoy[36] ^= 0x55
                yield now, Packet(bytes(decoy), checksum_ready=True)
        yield now, packet


@given(
    st.sampled_from([HELLO, BAD]),
    st.lists(st.integers(1, len(HELLO) - 1), max_size=8),
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 15)), max_size=3),
    st.sampled_from(["allow-list", "block-list", "left-open", "impatient", "tls-alone", "allow-list-careful"]),
)
@example(HELLO, [100, 200], [(1, 4), (2, 5)], "allow-list")
@example(BAD, [100, 200], [(1, 12)], "allow-list")
@example(HELLO, [100, 200], [(1, 2)], "allow-list")
@example(BAD, [100, 200], [(1, 2)], "block-list")
@example(HELLO, [100, 200], [(1, 10)], "allow-list")
@example(HELLO, [100, 200], [(1, 15)], "allow-list")
@example(HELLO, [100, 200], [(1, 13), (2, 13)], "allow-list")
def test_every_packet_gets_the_same_verdict(message: bytes, cuts: list[int], what: list[tuple[int, int]], name: str) -> None:
    """Whatever comes between the segments; and the memory and the facts are the same at the end."""
    memories = [FlowMemory(memoryview(bytearray(SIZE)), bytes(16)) for _ in range(2)]
    whole = judge([name], context=Context(flows=memories[0]))
    judged, table = quick([name], memories[1])
    packets = list(events(message, cuts, what))
    for now, packet in packets:
        whole.now = judged.now = now
        wanted = whole.verdict(packet)
        got = found(table, packet, now)
        assert (got or judged.verdict(packet)) == wanted, packet
    ends = packets[0][1].headers.five_tuple
    known = [memory.recall(ends) for memory in memories]
    assert (known[0] is None) == (known[1] is None)
    if known[0] is not None and known[1] is not None:
        assert known[0][0] == known[1][0]
        assert known[1][1].items() <= known[0][1].items()


def test_what_has_come_is_handed_over() -> None:
    whole = judge(["allow-list"])
    judged, table = quick()
    *before, last = start() + segments(HELLO, [100, 200])
    for packet in before:
        whole.now = judged.now = 1.0
        assert found(table, packet) is whole.verdict(packet)
    (flow,) = judged.show_openings(8)
    assert whole.flows is not None
    other = whole.flows.find(last.headers.five_tuple)
    assert other is not None
    assert flow.facts == other.facts == {"dpi": "undecided", "protocol": "tls"}
    assert (flow.undecided, flow.message, flow.packets) == (True, 0, other.packets)
    (here,) = [state for element, state in flow.state.items() if not isinstance(element, Dpi)]
    (there,) = [state for element, state in other.state.items() if not isinstance(element, Dpi)]
    for name in ("packets", "size", "open", "known", "decided", "message", "denied"):
        assert getattr(here, name) == getattr(there, name), name
    assert found(table, last) is None
    assert judged.verdict(last) is whole.verdict(last) is ACCEPT
    assert flow.facts == other.facts


def test_the_kernel_keeps_no_verdict_before_the_name_is_known() -> None:
    judged = judge(["allow-list"], behind=[("offload", {"mark": "0x4e000000/0xff000000"})])
    whole = judge(["allow-list"], behind=[("offload", {"mark": "0x4e000000/0xff000000"})])
    table = judged.settle_flows()
    assert isinstance(table, FlowTable)
    packets = start() + segments(HELLO, [100, 200])
    got = [found(table, packet) for packet in packets]
    assert got == [whole.verdict(packet) for packet in packets] == [ACCEPT] * 5 + [KEPT]


def test_parts_that_are_forgotten_take_no_memory() -> None:
    """16 MB are kept at most. These are more, of which a few at a time are known."""
    table = FlowTable(limit=8)
    table.judge_openings(Openings(lambda *_: (b"", ()), (), (53,), None))
    part = made_hello([1] * 1950, [server_name(b"www.good.test")])[:3950]
    for port in range(10000, 15000):
        client = f"10.0.0.1:{port}"
        assert found(table, tcp(client, SERVER, flags="S", seq=5)) is ACCEPT
        assert found(table, tcp(client, SERVER, part, seq=6, ack=10)) is ACCEPT
    assert 5000 * len(part) > 1 << 24


def test_hellos_of_browsers_are_plain() -> None:
    """They offer ECH, or pretend to, and values without meaning (RFC 8701)."""
    extensions = [
        (0x0A0A, b""), server_name(b"www.good.test"), numbers(10, 0x0A0A, 29, 23), (16, b"\0\x0c\2h2\x08http/1.1"),
        numbers(13, 0x403), (43, b"\6\x0a\x0a\3\4\3\3"), (0xFE0D, b"\0\0\1\0\1\0\0\x20" + bytes(180)), (0x1A1A, b"\0"),
    ]  # fmt: skip
    hello = made_hello([0x0A0A, 0x1301, 0x1302], extensions, session=bytes(32))
    assert name_in_opening(hello) == ("tls", "www.good.test")
    assert name_in_opening(made_hello([0x1301], [*extensions, (0xFE0D, b"\0")])) is None
