"""The compiled flow table against the chain that is shown every packet: each packet gets the same verdict from both."""

from __future__ import annotations

from typing import Any

import pytest
from flow_judges import POLICIES, conversations, judge
from hypothesis import given
from hypothesis import strategies as st

from nfq_agent.counters import Counters
from nfq_agent.element import PacketElement
from nfq_agent.element_chain import ElementChain
from nfq_agent.elements import packet_element
from nfq_agent.flow import Flow, Watch
from nfq_agent.flow_table import FlowTable
from nfq_agent.openings import is_plain_request
from nfq_agent.packet import Packet
from nfq_agent.protocols import Found, http1
from nfq_agent.service.packet_judge import PacketJudge, WorkerSettings
from nfq_agent.testing import tcp, udp
from nfq_agent.verdict import ACCEPT, DROP, Action, Verdict


def differences(policies: list[str], seed: int, talks: int, tuples: int, monitor: bool = False) -> tuple[list[str], int, int]:
    """Where the two differ; how many packets there were, and how many of them the chain was not shown."""
    whole, quick = judge(policies, monitor), judge(policies, monitor)
    table = quick.settle_flows()
    assert isinstance(table, FlowTable)
    found: list[str] = []
    count = unshown = 0
    for now, packet in conversations(seed, talks, tuples):
        whole.now = quick.now = now
        wanted = whole.verdict(packet)
        got = table.look_up(packet.payload, packet.length, now, packet.checksum_ready)
        count += 1
        if got is None:
            got = quick.verdict(packet)
        else:
            unshown += 1
        if got != wanted and (got.action, got.rejects) != (wanted.action, wanted.rejects):
            found.append(f"seed {seed}, packet {packet.id} {packet!r}: {got} instead of {wanted}")
    return found, count, unshown


@pytest.mark.parametrize("policies", [[name] for name in POLICIES] + [["left-open", "allow-list"]], ids="-".join)
@pytest.mark.parametrize("tuples", [6, 60000])
def test_no_verdict_differs(policies: list[str], tuples: int) -> None:
    shown = 0
    for seed in range(4):
        found, count, unshown = differences(policies, seed, 30, tuples)
        assert found == []
        shown += count - unshown
        assert unshown
    assert shown


def test_no_verdict_differs_in_monitor_mode() -> None:
    for seed in range(3):
        assert differences(["allow-list"], seed, 40, 6, monitor=True)[0] == []


class Shy(PacketElement):
    """Wants the client's payload alone; counts what it is shown."""

    needs = packet_element("dpi").needs

    def __init__(self, *_: Any) -> None:
        super().__init__("shy", None, print)
        self.shown: list[bytes] = []

    def decide(self, packet: Packet, flow: Flow | None) -> Verdict | None:
        self.shown.append(packet.data)
        return None

    def watches(self, flow: Flow) -> int:
        return Watch.CLIENT


class Open(Shy):
    """Says nothing of what it wants."""

    watches = PacketElement.watches


def shown_to(element: Shy) -> list[bytes]:
    """What an element was shown of a short conversation."""
    judge = PacketJudge(
        ElementChain([element], ACCEPT), WorkerSettings(1, ACCEPT, DROP, False), Counters(), print, lambda *_: None
    )
    table = judge.settle_flows()
    assert table is None or isinstance(table, FlowTable)
    client, server = "192.0.2.1:40000", "198.51.100.1:80"
    for packet in (
        tcp(client, server, flags="S"), tcp(server, client, flags="SA"), tcp(client, server, flags="A"),
        tcp(client, server, b"one"), tcp(server, client, b"two"), tcp(client, server, flags="A"), tcp(client, server, b"three"),
        tcp(client, server, flags="FA"), udp(client, server, b"four"), udp(server, client, b"five"), udp(client, server, b"six"),
    ):  # fmt: skip
        if table is None or table.look_up(packet.payload, packet.length, 1.0) is None:
            assert judge.verdict(packet) is ACCEPT
    return element.shown


def test_an_element_is_shown_what_it_asks_for() -> None:
    # The two ends of a connection, and the first two datagrams of a flow, always.
    assert shown_to(Shy()) == [b"", b"", b"one", b"three", b"", b"four", b"five", b"six"]


def test_an_element_that_says_nothing_is_shown_every_packet() -> None:
    assert len(shown_to(Open())) == 11


def test_what_is_not_plain_is_shown() -> None:
    judge = PacketJudge(ElementChain([Shy()], ACCEPT), WorkerSettings(1, ACCEPT, DROP, False), Counters(), print, lambda *_: None)
    table = judge.settle_flows()
    assert isinstance(table, FlowTable)
    packet = tcp("192.0.2.1:40000", "198.51.100.1:80", flags="A")
    judge.verdict(packet)
    assert table.look_up(packet.payload, packet.length, 1.0) is ACCEPT
    data = packet.payload
    for other in (
        b"\x46" + data[1:20] + b"\1\1\1\1" + data[20:],  # an option of IP
        data[:6] + b"\x20\0" + data[8:],  # a first fragment
        data[:2] + b"\0\0" + data[4:],  # no length
        data + b"padding",
        data[:32] + b"\x40" + data[33:],  # a TCP header that is too short
        data[:39],
        b"\x55" + data[1:],
        b"",
    ):
        assert table.look_up(other, len(other), 1.0) is None, other
    assert table.look_up(data, len(data) + 1, 1.0) is None


def test_later_requests_for_the_same_host_are_not_shown_and_others_are() -> None:
    """A third request for a denied host does not pass, whatever was not shown before it."""
    whole, quick = judge(["allow-list"]), judge(["allow-list"])
    table = quick.settle_flows()
    assert isinstance(table, FlowTable)
    client, server = "192.0.2.1:40000", "198.51.100.1:80"
    packets = [tcp(client, server, flags="S", seq=0), tcp(server, client, flags="SA", ack=1)]
    sent = 1
    for number, host in enumerate(["www.good.test"] * 5 + ["www.bad.test"] * 2):
        head = b"GET /%d HTTP/1.1\r\nHost: %s\r\n\r\n" % (number, host.encode())
        packets.append(tcp(client, server, head, seq=sent, ack=1 + 10 * number))
        sent += len(head)
        packets.append(tcp(server, client, b"x" * 10, seq=1 + 10 * number, ack=sent))
    # A repeated request with another name is another one than was read.
    unshown = []
    for packet in packets:
        whole.now = quick.now = 1.0
        wanted = whole.verdict(packet)
        got = table.look_up(packet.payload, packet.length, 1.0)
        unshown.append(got is not None)
        assert (got or quick.verdict(packet)) == wanted
    shown = [packet.data for packet, quiet in zip(packets, unshown, strict=True) if not quiet and packet.data]
    assert [data.split()[4] for data in shown] == [b"www.bad.test"]
    assert wanted is DROP


@given(
    st.sampled_from([b"GET", b"POST", b"CONNECT", b"get", b"", b"G T"]),
    st.sampled_from([b"/", b"/a?b", b"*", b"http://a.test/", b"/\xc3", b"/ "]),
    st.sampled_from([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/1.2", b"http/1.1", b""]),
    st.lists(
        st.sampled_from([
            b"Host: a.test",
            b"hOST:a.test:80 \t", b"Host: A.test", b"Host: a.test.", b"Host: b.test", b"Host: a.test:x", b"Host:",
            b"Host: a.test@b", b"Host : a.test", b"X: y", b"X:\x80", b"X:\x01", b"X: y\r", b" folded", b"Content-Length: 0",
            b"Content-Length: 5", b"Transfer-Encoding: chunked", b"Upgrade: x", b":", b"X", b"Hosts: b.test", b"Cookie: a=b\x7f",
        ]),
        max_size=4,
    ),
    st.sampled_from([b"\r\n"] * 5 + [b"\n"]),
    st.sampled_from([b""] * 5 + [b"x", b"GET / HTTP/1.1\r\nHost: b.test\r\n\r\n", b"\r\n"]),
    st.integers(0, 3),
)  # fmt: skip
def test_a_plain_request_says_what_the_parser_says(  # its parts
    method: bytes, target: bytes, version: bytes, fields: list[bytes], end: bytes, behind: bytes, cut: int
) -> None:
    data = end.join([b" ".join((method, target, version)), *fields, b"", b""]) + behind
    data = data[: len(data) - cut]
    if is_plain_request(data, b"a.test"):
        found = http1.parse(data)
        assert isinstance(found, Found)
        assert (found.decided, found.used, found.skip, found.then) == (True, len(data), 0, http1.parse)
        assert found.facts["http_host"] == "a.test"
        assert "conflict" not in found.facts


def test_what_browsers_send_is_a_plain_request() -> None:
    head = b"GET /some/path?x=1 HTTP/1.1\r\nHost: www.good.test\r\nUser-Agent: Mozilla/5.0 (X11)\r\nAccept: */*\r\n\r\n"
    assert is_plain_request(head, b"www.good.test")
    assert not is_plain_request(head, b"good.test")
    assert not any(is_plain_request(head[:at], b"www.good.test") for at in range(len(head)))


@pytest.mark.parametrize("ready", [True, False])
def test_a_packet_whose_header_has_a_wrong_checksum_says_nothing(ready: bool) -> None:
    """No offload fills that one in: the receiver discards the packet, and the client says something else in its place."""
    good, bad = (b"GET / HTTP/1.1\r\nHost: www.%s.test\r\n\r\n" % name for name in (b"good", b"bad"))
    client, server = "192.0.2.1:40000", "198.51.100.1:80"
    whole, quick = judge(["allow-list"]), judge(["allow-list"])
    table = quick.settle_flows()
    assert isinstance(table, FlowTable)
    verdicts = []
    for spoilt, packet in (
        (True, tcp(client, server, flags="S", seq=77)),
        (False, tcp(client, server, flags="S", seq=5)),
        (False, tcp(server, client, flags="SA", seq=9, ack=6)),
        (True, tcp(client, server, good, seq=6, ack=10)),
        (False, tcp(client, server, bad, seq=6, ack=10)),
    ):
        data = bytearray(packet.payload)
        data[8] -= spoilt
        each = Packet(bytes(data), checksum_ready=ready)
        got = table.look_up(each.payload, each.length, 1.0, ready)
        assert not (spoilt and got)
        verdicts.append((got or quick.verdict(each)).action)
        assert verdicts[-1] is whole.verdict(each).action
    assert verdicts[1:] == [Action.ACCEPT, Action.ACCEPT, Action.DROP, Action.DROP]
