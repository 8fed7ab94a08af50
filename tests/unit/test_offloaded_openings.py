"""Connections whose first message is accepted without an element, and whose verdict the kernel keeps (`offload`)."""

from __future__ import annotations

from collections import Counter

import pytest
from flow_judges import conversations, judge, quick
from tcp_openings import BAD, CLIENT, HEAD, HELLO, REST, SERVER, found, opening

from nfq_agent.flow_table import FlowTable
from nfq_agent.openings import Openings
from nfq_agent.packet import Packet
from nfq_agent.repeats import MOST
from nfq_agent.testing import tcp
from nfq_agent.verdict import ACCEPT, DROP, Action, Verdict

MASK = 0xFF000000
OFFLOAD = [("offload", {"mark": "0x4e000000/0xff000000"})]
KEPT = Verdict(Action.REPEAT, mark=0x4E000000, means=Action.ACCEPT)
DENIED = Verdict(Action.REPEAT, mark=0x4F000000, means=Action.DROP)
_FIN, _SYN, _RST, _ACK = 1, 2, 4, 16


@pytest.mark.parametrize("message", [HELLO, HEAD], ids=["hello", "request"])
def test_the_first_message_has_the_mark_and_nothing_before_it_is_shown(message: bytes) -> None:
    whole = judge(["allow-list"], behind=OFFLOAD)
    judged, table = quick(behind=OFFLOAD)
    got = []
    for packet in opening(message, ends=False):
        seen = found(table, packet)
        got.append(seen)
        assert (seen or judged.verdict(packet)) == whole.verdict(packet)
    # What still comes to the queue is shown.
    assert got == [ACCEPT, ACCEPT, ACCEPT, KEPT, None]


def test_a_packet_with_a_mark_is_shown() -> None:
    for mark in (0x4E000000, 0x1):
        judged, table = quick(behind=OFFLOAD)
        *before, message = list(opening(HELLO, ends=False))[:4]
        assert [found(table, packet, mark=mark) for packet in before] == [ACCEPT] * 3
        assert found(table, message, mark=mark) is None
        marked = tcp(CLIENT, SERVER, HELLO, seq=6, ack=10, mark=mark)
        assert judged.verdict(marked) == (ACCEPT if mark & MASK else Verdict(Action.REPEAT, mark=0x4E000001, means=Action.ACCEPT))


def test_a_message_that_comes_back_without_its_mark_is_shown() -> None:
    """A rule of others may take the mark away: the bound on REPEAT is kept where the packet is shown."""
    judged, table = quick(behind=OFFLOAD)
    packets = list(opening(HELLO, ends=False))[:4]
    assert [found(table, packet) for packet in packets][-1] == KEPT
    for _ in range(20):
        assert found(table, packets[-1]) is None
        last = judged.verdict(packets[-1])
    assert last == ACCEPT


def test_the_next_connection_on_the_same_ends_is_judged_by_what_it_says() -> None:
    """The kernel keeps its end away, so that none was seen."""
    judged, table = quick(behind=OFFLOAD)
    for start in (5, 2000, 4000):
        assert [found(table, packet) for packet in list(opening(HEAD, start=start))[:4]] == [ACCEPT, ACCEPT, ACCEPT, KEPT]
    *before, message = list(opening(BAD, start=6000))[:4]
    assert [found(table, packet) for packet in before] == [ACCEPT] * 3
    assert found(table, message) is None
    assert judged.verdict(message) == DENIED
    assert len(table) == 1


def test_a_syn_on_the_ends_of_a_decided_connection_gets_no_lasting_verdict() -> None:
    """Else what the new connection says would not be seen at all."""
    judged = judge(["allow-list"], behind=OFFLOAD)
    assert [judged.verdict(packet) for packet in list(opening(HELLO))[:4]][-1] == KEPT
    again = [judged.verdict(packet) for packet in list(opening(BAD, start=2000))[:4]]
    assert again == [ACCEPT, ACCEPT, ACCEPT, DENIED]


def test_an_answer_to_an_unseen_syn_gets_no_lasting_verdict() -> None:
    judged = judge(["allow-list"], behind=OFFLOAD)
    assert [judged.verdict(packet) for packet in list(opening(HELLO))[:4]][-1] == KEPT
    assert judged.verdict(list(opening(BAD, start=2000))[1]) == ACCEPT


@pytest.mark.parametrize("compiled", [False, True], ids=["shown", "compiled"])
def test_the_next_connection_on_the_ends_of_a_denied_one_is_judged_by_what_it_says(compiled: bool) -> None:
    """The kernel tracks another one when the first is over, and keeps the end of the first away too."""
    judged, table = quick(behind=OFFLOAD) if compiled else (judge(["allow-list"], behind=OFFLOAD), None)

    def verdict(packet: Packet) -> Verdict:
        return (None if table is None else found(table, packet)) or judged.verdict(packet)

    for start, message, last in ((5, BAD, DENIED), (2000, HELLO, KEPT), (4000, BAD, DENIED)):
        assert [verdict(packet) for packet in list(opening(message, start=start))[:4]] == [ACCEPT, ACCEPT, ACCEPT, last]


@pytest.mark.parametrize("compiled", [False, True], ids=["shown", "compiled"])
@pytest.mark.parametrize(("message", "last"), [(HEAD, KEPT), (HEAD.replace(b"good", b"evil"), DENIED)], ids=["good", "bad"])
def test_a_connection_of_which_no_answer_was_seen_is_judged_by_what_it_says(
    message: bytes, last: Verdict, compiled: bool
) -> None:
    """It begins with two SYNs, on the ends of one that was answered and whose verdict the kernel keeps."""
    judged, table = quick(behind=OFFLOAD) if compiled else (judge(["allow-list"], behind=OFFLOAD), None)
    first = list(opening(HEAD, start=5))[:4]
    second = [tcp(CLIENT, SERVER, flags="S", seq=seq) for seq in (90000, 150000)]
    packets = [*first, *second, tcp(CLIENT, SERVER, message, seq=150001, ack=10)]
    got = [(None if table is None else found(table, packet)) or judged.verdict(packet) for packet in packets]
    assert got == [ACCEPT] * 3 + [KEPT] + [ACCEPT] * 2 + [last]


@pytest.mark.parametrize("compiled", [False, True], ids=["shown", "compiled"])
def test_a_drop_of_one_segment_does_not_last(compiled: bool) -> None:
    """Of one that its receiver discards: the kernel would deny the whole connection."""
    judged, table = quick(behind=OFFLOAD) if compiled else (judge(["allow-list"], behind=OFFLOAD), None)
    packets = list(opening(HEAD, ends=False))[:4]
    at = 6 + len(HEAD)
    discarded = tcp(CLIENT, SERVER, b"x" * 100, seq=at, ack=10, flags="")
    got = [(None if table is None else found(table, packet)) or judged.verdict(packet) for packet in (*packets, discarded)]
    assert got == [ACCEPT] * 3 + [KEPT, DROP]


EVIL = HEAD.replace(b"good", b"evil")


@pytest.mark.parametrize("compiled", [False, True], ids=["shown", "compiled"])
@pytest.mark.parametrize(("said", "last"), [(HEAD, KEPT), (REST, KEPT), (EVIL, DENIED)], ids=["good", "nothing", "bad"])
def test_a_connection_that_tracking_has_forgotten_continues(said: bytes, last: Verdict, compiled: bool) -> None:
    """As with `conntrack -F`: what passed meanwhile is not known, and what it says now is."""
    judged, table = quick(behind=OFFLOAD) if compiled else (judge(["allow-list"], behind=OFFLOAD), None)
    at = 6 + len(HEAD) + 500
    packets = [*list(opening(HEAD, ends=False))[:4], tcp(CLIENT, SERVER, said, seq=at, ack=600)]
    got = []
    for packet, judged.now in zip(packets, (1.0, 1.0, 1.0, 1.0, 5.0), strict=True):
        got.append((None if table is None else found(table, packet, judged.now)) or judged.verdict(packet))
    assert got == [ACCEPT] * 3 + [KEPT, last]


def test_a_connection_that_is_not_tracked_is_read_without_gaps() -> None:
    judged = judge(["allow-list"], behind=OFFLOAD)
    before = list(opening(HEAD, ends=False))[:4]
    assert [judged.verdict(packet) for packet in before][-1] == KEPT
    assert judged.verdict(tcp(CLIENT, SERVER, HEAD, seq=6, ack=10, mark=0x4E000000)) == ACCEPT
    judged.now = 5.0
    assert judged.verdict(tcp(CLIENT, SERVER, HEAD, seq=6 + len(HEAD) + 500, ack=600)) == DROP


# Seeds of which a verdict differed once.
DIFFERED = (95, 103, 116, 123, 125, 128, 132, 135, 136, 148, 149)


@pytest.mark.parametrize("tracked", [True, False], ids=["tracked", "untracked"])
@pytest.mark.parametrize("tuples", [3, 6, 60000])
def test_no_verdict_differs(tuples: int, tracked: bool) -> None:
    """tracked: the kernel keeps the verdicts on connections, until another one begins on the same ends."""
    unshown = marked = 0
    for seed in (*range(6), *DIFFERED):
        whole = judge(["left-open", "allow-list"], behind=OFFLOAD)
        judged = judge(["left-open", "allow-list"], behind=OFFLOAD)
        table = judged.settle_flows()
        assert isinstance(table, FlowTable)
        for each in (whole, judged):
            assert each.flows is not None
            each.flows.keep_forgotten()
        seen: Counter[bytes] = Counter()
        kept: set[frozenset[tuple[bytes, int | None]]] = set()
        over: set[frozenset[tuple[bytes, int | None]]] = set()
        for now, packet in conversations(seed, 40, tuples):
            ends = frozenset(((packet.headers.five_tuple.src, packet.headers.five_tuple.sport),
                              (packet.headers.five_tuple.dst, packet.headers.five_tuple.dport)))  # fmt: skip
            flags = packet.headers.tcp_flags or 0
            if flags & (_FIN | _RST):
                over.add(ends)
            elif flags & (_SYN | _ACK) == _SYN and ends in over:
                over.discard(ends)
                kept.discard(ends)
            seen[packet.payload] += 1
            # A datagram that comes so often is taken for one that only comes back.
            if ends in kept or seen[packet.payload] > MOST:
                continue
            for each in (whole, judged):
                each.now = now
                # Else the two forget what is too old at other times.
                assert each.flows is not None
                each.flows.take_forgotten(now)
            wanted = whole.verdict(packet)
            got = found(table, packet, now)
            unshown += got is not None
            marked += got is not None and got.mark is not None
            got = got or judged.verdict(packet)
            assert got == wanted, f"seed {seed}, packet {packet.id} {packet!r}"
            if tracked and got.mark is not None:
                kept.add(ends)
    assert unshown
    # Ends that many conversations share are nearly always known to an element.
    assert marked or tuples < 60000


def test_a_request_behind_an_answer_that_does_not_last_gets_the_mark() -> None:
    """A request in the SYN is judged, and the SYN that answers it gets no lasting verdict: the next request has one."""
    whole, judged = (judge(["allow-list"], behind=OFFLOAD) for _ in range(2))
    table = judged.settle_flows()
    assert isinstance(table, FlowTable)
    end = 6 + len(HEAD)
    packets = [
        tcp(CLIENT, SERVER, HEAD, flags="S", seq=5), tcp(SERVER, CLIENT, flags="SA", seq=9, ack=end),
        tcp(CLIENT, SERVER, flags="A", seq=end, ack=10), tcp(SERVER, CLIENT, b"x" * 9, seq=10, ack=end),
        tcp(CLIENT, SERVER, HEAD, seq=end, ack=19),
    ]  # fmt: skip
    for packet in packets:
        wanted = whole.verdict(packet)
        assert (found(table, packet) or judged.verdict(packet)) == wanted
    assert wanted == KEPT


def test_what_the_kernel_keeps_is_forgotten_first() -> None:
    table = FlowTable(limit=8)
    table.judge_openings(Openings(lambda protocol, *_: (b"", ()), (), (53,), None), KEPT)
    for port in range(6):
        for packet in list(opening(HELLO, f"10.0.0.1:{40000 + port}"))[: 3 if port == 1 else 4]:
            assert found(table, packet) in (ACCEPT, KEPT)
    for port in range(4):
        assert found(table, next(opening(HELLO, f"10.0.0.2:{40000 + port}"))) is ACCEPT
    assert table.evicted == 2
    # Number 1, which the kernel does not keep, is not among them.
    syn = next(opening(HELLO, "10.0.0.1:40001"))
    assert found(table, syn) is ACCEPT
    assert table.evicted == 2


def test_their_messages_take_bounded_memory() -> None:
    """Nothing acknowledges them here: the oldest connections are forgotten in place of being shown."""
    _, table = quick(behind=OFFLOAD)
    message = b"GET / HTTP/1.1\r\nHost: www.good.test\r\nX: %s\r\n\r\n" % (b"x" * 4000)
    number = 4400
    for port in range(number):
        for packet in list(opening(message, client=f"192.0.2.1:{10000 + port}"))[:4]:
            assert found(table, packet) in (ACCEPT, KEPT)
    assert 4000 < len(table) < number


def test_a_verdict_that_does_not_last_has_no_mark() -> None:
    whole, judged = (judge(["left-open"], behind=[("rate-limit", {"rate": "100/s"}), *OFFLOAD]) for _ in range(2))
    table = judged.settle_flows()
    for packet in list(opening(HELLO))[:4]:
        got = table.look_up(packet.payload, packet.length, 1.0) if isinstance(table, FlowTable) else None
        wanted = whole.verdict(packet)
        assert (got or judged.verdict(packet)) == wanted
    assert wanted is ACCEPT
