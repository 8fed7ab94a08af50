"""The `dpi` element: what it makes of segments and datagrams, its limits, its memory, and later packets that say otherwise."""

from __future__ import annotations

import struct
import tracemalloc
from itertools import pairwise
from typing import Any

import pytest
from examples import EXAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st
from openings import DATAGRAMS, OPENINGS, client_hello, dns_query, made_hello, record, server_name
from talk import CLIENT, HELLO, SERVER, Talk

from nfq_agent.element import Needs, PacketElement
from nfq_agent.elements.dpi import Dpi, DpiOptions
from nfq_agent.flow import Flow
from nfq_agent.flow_table import FlowTable
from nfq_agent.packet import Packet
from nfq_agent.protocols import quic_keys
from nfq_agent.testing import Bench, ip_packet, tcp, udp
from nfq_agent.verdict import DROP, Verdict

CLIENT6, SERVER6 = "[2001:db8::1]:40000", "[2001:db8::2]:443"


@pytest.mark.parametrize(("src", "dst"), [(CLIENT, SERVER), (CLIENT6, SERVER6)])
@pytest.mark.parametrize("name", list(OPENINGS))
def test_openings_in_one_segment_of_each_side(name: str, src: str, dst: str) -> None:
    client, server, wanted = OPENINGS[name]
    talk = Talk(src=src, dst=dst).open()
    if server:
        talk.answer(server)
    if client:
        talk.say(client)
    assert {key: talk.facts.get(key) for key in wanted} == wanted
    assert talk.facts["dpi"] == "decided"
    assert not talk.bench.said


@pytest.mark.parametrize("name", list(DATAGRAMS))
def test_datagrams(name: str) -> None:
    data, wanted = DATAGRAMS[name]
    talk = Talk()
    talk.send(udp("192.0.2.1:5000", "198.51.100.1:5001", data))
    assert {key: talk.facts.get(key) for key in wanted} == wanted
    assert talk.facts["dpi"] == "decided"
    for changed in () if name == "dns" else (data[:-1], data[1:], b"\xff" + data[1:]):
        other = Talk()
        other.send(udp("192.0.2.1:5000", "198.51.100.1:5001", changed))
        assert other.facts == {"dpi": "undecided"}


@settings(max_examples=EXAMPLES * 3 // 5)
@given(
    st.sampled_from([name for name, (client, _, _) in OPENINGS.items() if client]),
    st.lists(st.integers(1, 500), max_size=4),
    st.integers(0, 0xFFFFFFFF),
    st.randoms(use_true_random=False),
)
def test_split_reordered_repeated_and_overlapping(name: str, cuts: list[int], isn: int, random: Any) -> None:
    client, server, wanted = OPENINGS[name]
    ends = sorted({0, len(client), *(cut % len(client) for cut in cuts)})
    # Each piece begins a little before its place, so that it overlaps the one before.
    pieces = [(max(0, at - random.randrange(4)), end) for at, end in pairwise(ends)]
    pieces += pieces[:1]
    random.shuffle(pieces)
    talk = Talk(isn=isn)
    talk.open()
    if server:
        talk.answer(server)
    for at, end in pieces:
        talk.say(client[at:end], at)
    assert {key: talk.facts.get(key) for key in wanted} == wanted
    assert talk.facts["dpi"] == "decided"


def test_a_flow_is_undecided_until_the_last_byte() -> None:
    talk = Talk().open()
    assert talk.facts["dpi"] == "undecided"
    talk.say(HELLO[:300])
    assert talk.facts == {"dpi": "undecided", "protocol": "tls"}
    assert talk.flow is not None
    assert talk.flow.undecided
    talk.say(HELLO[300:-1], 300)
    assert talk.facts["dpi"] == "undecided"
    talk.say(HELLO[-1:], len(HELLO) - 1)
    assert talk.facts["tls_sni"] == "a.server.test"
    assert not talk.flow.undecided


def test_no_bytes_of_a_decided_flow_wait() -> None:
    talk = Talk().open().say(HELLO[:300]).say(HELLO[300:], 300)
    element = talk.bench.element
    assert isinstance(element, Dpi)
    assert not element.kept.open
    assert talk.flow is not None
    assert talk.flow.state[element].held == 0


BEFORE = {"dpi": "gave-up", "dpi_reason": "it began before the first packet that was seen"}


def test_a_connection_that_began_before_is_given_up() -> None:
    talk = Talk().say(b"\x17\x03\x03\x00\x10" + b"x" * 16)
    assert talk.facts == BEFORE
    assert talk.flow is not None
    assert talk.flow.midstream


def test_a_connection_that_began_before_is_read_from_its_next_message_on() -> None:
    talk = Talk().say(b"x" * 20)
    talk.say(HELLO[:50], 20)
    assert talk.facts["dpi"] == "undecided"
    talk.say(HELLO[50:], 70)
    assert talk.facts["tls_sni"] == "a.server.test"
    assert talk.flow is not None
    assert not talk.flow.midstream


@pytest.mark.parametrize(
    "text", [b"lots of words in a line\nand more\n", b"GET it\n", b"\x16\x03\x01\x00\x02\x01\x00", b"GET / HTTP/1.1\r\n:\r\n\r\n"]
)
def test_what_only_looks_like_a_message_is_none_in_midstream(text: bytes) -> None:
    talk = Talk().say(text)
    assert talk.facts["dpi"] != "decided"
    talk.say(HELLO, len(text))
    assert talk.facts["tls_sni"] == "a.server.test"


def test_one_direction_is_enough() -> None:
    talk = Talk()
    talk.send(tcp(talk.src, talk.dst, flags="S", seq=talk.isn))
    talk.say(HELLO)
    assert talk.facts["tls_sni"] == "a.server.test"


def test_the_answer_to_the_syn_is_as_good_as_the_syn() -> None:
    talk = Talk()
    talk.send(tcp(talk.dst, talk.src, flags="SA", seq=talk.peer, ack=talk.isn + 1))
    talk.say(HELLO)
    assert talk.facts["tls_sni"] == "a.server.test"


def test_fast_open_carries_the_hello_in_the_syn() -> None:
    talk = Talk()
    talk.send(tcp(talk.src, talk.dst, HELLO, flags="S", seq=talk.isn))
    assert talk.facts["tls_sni"] == "a.server.test"


def test_an_offloaded_packet_of_64_kilobytes() -> None:
    talk = Talk().open().say(b"POST /up HTTP/1.1\r\nHost: big.test\r\nContent-Length: 60000\r\n\r\n" + b"x" * 60000)
    assert talk.facts["http_host"] == "big.test"


def test_thirty_two_packets_and_no_more() -> None:
    talk = Talk().open()
    for at in range(31):
        talk.say(HELLO[at : at + 1], at)
    assert talk.facts["dpi"] == "undecided"
    talk.say(HELLO[31:32], 31)
    assert talk.facts["dpi"] == "gave-up"
    # It has a name, which is not known: not the same as to have none.
    assert talk.facts["conflict"] == "32 packets with payload, and it is not known"
    talk.say(HELLO[32:], 32)
    assert "tls_sni" not in talk.facts


def test_the_thirty_second_packet_still_counts() -> None:
    talk = Talk().open()
    for at in range(31):
        talk.say(HELLO[at : at + 1], at)
    talk.say(HELLO[31:], 31)
    assert talk.facts["dpi"] == "decided"


def test_a_hello_of_11_kilobytes_in_segments_of_1024() -> None:
    hello = made_hello([0x1301], [(0x1234, bytes(11_000)), server_name(b"a.test")])
    talk = Talk().open()
    for at in range(0, len(hello), 1024):
        talk.say(hello[at : at + 1024], at)
    assert talk.facts["tls_sni"] == "a.test"


def test_sixteen_kilobytes_and_no_more() -> None:
    long = made_hello([0x1301], [(0x1234, bytes(15000)), server_name(b"a.test")])
    assert Talk().open().say(long).facts["dpi"] == "decided"
    longer = made_hello([0x1301], [(0x1234, bytes(16380)), server_name(b"a.test")])
    longer = record(longer[5:], 8000)
    talk = Talk().open().say(longer[:9000]).say(longer[9000:], 9000)
    reason = "not known after 16 KiB"
    assert talk.facts == {"dpi": "gave-up", "dpi_reason": reason, "conflict": reason, "protocol": "tls"}


def test_ten_seconds_and_no_more() -> None:
    talk = Talk().open().say(HELLO[:100])
    talk.bench.now += 9.9
    Talk(talk.bench, src="192.0.2.9:1").open()
    assert talk.facts["dpi"] == "undecided"
    talk.bench.now += 0.2
    # Whichever packet comes next tells the time.
    Talk(talk.bench, src="192.0.2.9:2").open()
    assert talk.facts["dpi"] == "gave-up"


def test_ten_seconds_begin_with_the_first_payload_of_either_side() -> None:
    talk = Talk()
    talk.send(tcp(talk.src, talk.dst, flags="S", seq=talk.isn))
    talk.answer(b"220 of a server whose SYN was not seen\r\n")
    talk.bench.now += 10.1
    # The client has said nothing that could hide a name.
    assert talk.say(HELLO).facts == {"dpi": "gave-up", "dpi_reason": "10 seconds have passed"}


def test_a_client_that_waits_before_its_first_word_is_heard() -> None:
    talk = Talk().open()
    talk.bench.now += 60
    assert talk.say(HELLO).facts["dpi"] == "decided"


def test_overlaps_that_differ_are_nothing_to_guess_from() -> None:
    other = client_hello("b.server.test")
    talk = Talk().open().say(HELLO[:200]).say(other[100:300], 100)
    assert talk.facts["dpi"] == "gave-up"
    assert "tls_sni" not in talk.facts
    (said,) = talk.bench.said
    assert "segments that overlap differ" in said.message
    assert said.level == "warning"


def test_a_protocol_that_is_not_known_is_given_up_at_once() -> None:
    talk = Talk().open().say(b"\xff\xfe\xfd unknown")
    assert talk.facts["dpi"] == "gave-up"
    assert "protocol" not in talk.facts


def test_another_connection_on_the_same_ports_starts_fresh() -> None:
    talk = Talk().open().say(HELLO)
    talk.isn, talk.peer = 500_000, 900_000
    talk.send(tcp(talk.src, talk.dst, flags="S", seq=talk.isn))
    # Whether it is one shows when the server answers: any host can send a SYN.
    assert talk.facts["tls_sni"] == "a.server.test"
    talk.send(tcp(talk.dst, talk.src, flags="SA", seq=talk.peer, ack=talk.isn + 1))
    assert talk.facts == {"dpi": "undecided"}
    assert talk.say(client_hello("b.server.test")).facts["tls_sni"] == "b.server.test"


def test_after_a_fin_a_syn_is_enough() -> None:
    talk = Talk().open().say(HELLO)
    talk.send(tcp(talk.src, talk.dst, flags="FA", seq=talk.isn + 1 + len(HELLO)))
    talk.isn = 700_000
    talk.send(tcp(talk.src, talk.dst, flags="S", seq=talk.isn))
    assert talk.facts == {"dpi": "undecided"}


def test_a_policy_does_not_judge_a_new_connection_by_the_old_ones_name() -> None:
    rule = ({"action": "accept", "tls_sni": ["b.*"]},)
    bench = Bench("policy", before=[("dpi", {})], default="drop", rule=rule)
    talk = Talk(bench).open()
    bench.assert_dropped(tcp(talk.src, talk.dst, HELLO, seq=talk.isn + 1))
    bench.assert_dropped(tcp(talk.src, talk.dst, HELLO, seq=talk.isn + 1, flags="FPA"))
    bench.assert_accepted(tcp(talk.src, talk.dst, flags="S", seq=5_000_000))
    bench.assert_accepted(tcp(talk.src, talk.dst, client_hello("b.server.test"), seq=5_000_001))


def test_a_syn_that_no_server_answers_changes_nothing() -> None:
    talk = Talk().open().say(HELLO)
    talk.send(tcp(talk.src, talk.dst, flags="S", seq=9))
    talk.send(tcp(talk.src, talk.dst, b"x", seq=10))
    assert talk.facts["tls_sni"] == "a.server.test"


def test_udp_that_is_not_known_is_given_up_after_thirty_two() -> None:
    talk = Talk()
    for _ in range(32):
        talk.send(udp("192.0.2.1:5000", "198.51.100.1:5001", b"rubbish"))
    assert talk.facts["dpi"] == "gave-up"


def test_quic_without_cryptography_is_quic_without_a_name_and_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quic_keys, "AVAILABLE", False)
    bench = Bench("dpi")
    header = b"\xc3\0\0\0\1\x08" + bytes(8) + b"\0\0" + struct.pack("!H", 0x4000 | 1180)
    datagram = header + bytes(1200 - len(header) + 200)
    for port in (1, 2):
        talk = Talk(bench)
        talk.send(udp(f"192.0.2.1:{port}", "198.51.100.1:443", datagram))
        assert talk.facts["protocol"] == "quic"
        assert talk.facts["quic_version"] == "1"
        assert talk.facts["dpi"] == "gave-up"
    assert len(bench.said) == 1


def test_ipv6_extension_headers_hide_nothing() -> None:
    talk = Talk(src=CLIENT6, dst=SERVER6)
    for plain in (
        tcp(CLIENT6, SERVER6, flags="S", seq=talk.isn),
        tcp(CLIENT6, SERVER6, HELLO, seq=talk.isn + 1),
    ):
        raw = plain.payload
        # Hop-by-hop and destination options, both of padding (RFC 8200 4.2).
        options = b"\x3c\0\1\4\0\0\0\0" + b"\6\0\1\4\0\0\0\0"
        talk.send(Packet(ip_packet(raw[8:24], raw[24:40], 0, options + raw[40:])))
    assert talk.facts["tls_sni"] == "a.server.test"


def test_cut_packets_are_said_once_and_nothing_is_made_of_them() -> None:
    talk = Talk().open()
    for at in (0, 200):
        whole = tcp(talk.src, talk.dst, HELLO[at:], seq=talk.isn + 1 + at)
        talk.send(Packet(whole.payload[:128], length=len(whole.payload)))
    assert len(talk.bench.said) == 1
    assert "cut at 128 bytes" in talk.bench.lines[0]
    assert "tls_sni" not in talk.facts


def test_the_log_says_what_each_flow_is() -> None:
    bench = Bench("dpi", log=True)
    Talk(bench).open().say(HELLO)
    Talk(bench, src="192.0.2.1:2").open().say(b"\xff" * 20)
    Talk(bench, dst="198.51.100.1:53").send(udp("192.0.2.1:5000", "198.51.100.1:53", dns_query("a.test", 28)))
    assert bench.lines == [
        "tcp 192.0.2.1:40000 -> 198.51.100.1:443: tls a.server.test",
        "tcp 192.0.2.1:2 -> 198.51.100.1:443: not identified: not a known protocol",
        "udp 192.0.2.1:5000 -> 198.51.100.1:53: dns a.test",
    ]
    assert bench.said[0].fields["tls_sni"] == "a.server.test"
    assert bench.said[0].fields["dpi"] == "decided"
    assert bench.said[2].fields["dns_type"] == "AAAA"


class Reader(PacketElement):
    """A foreign element, after `dpi`."""

    needs = Needs.FLOW

    def decide(self, packet: Packet, flow: Flow | None) -> Verdict | None:
        return DROP if flow is not None and flow.facts.get("tls_sni") == "a.server.test" else None


def test_elements_of_others_read_the_facts() -> None:
    bench = Bench(Reader, before=[("dpi", {})])
    talk = Talk(bench).open()
    bench.assert_dropped(tcp(talk.src, talk.dst, HELLO, seq=talk.isn + 1))
    bench.assert_accepted(tcp("192.0.2.1:2", talk.dst, HELLO, seq=1))


def test_other_protocols_are_left_alone() -> None:
    element = Dpi("dpi", DpiOptions(), lambda *_, **__: None)
    packet = Packet(ip_packet(b"\1\2\3\4", b"\1\2\3\5", 47, bytes(20)), time=1.0)
    flow = Flow(packet.headers.five_tuple, 1.0, 1.0)
    assert element.decide(packet, flow) is None
    assert flow.facts["dpi"] == "gave-up"
    assert element.decide(packet, None) is None


def test_flows_whose_bytes_are_kept_are_bounded() -> None:
    bench = Bench("dpi", openings=10)
    talks = [Talk(bench, src=f"192.0.2.1:{port}").open().say(HELLO[:50]) for port in range(1, 31)]
    assert [talk.facts["dpi"] for talk in talks] == ["gave-up"] * 20 + ["undecided"] * 10


def test_the_memory_of_a_flood_is_as_stated() -> None:
    """docs/dpi.md states 1.1 KiB a flow that only sent its SYN (1.2 at most), and 16 KiB for each of `openings`."""
    flows = 2000
    element = Dpi("dpi", DpiOptions(), lambda *_, **__: None)
    table = FlowTable(flows)
    packets = [tcp(f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}:1024", SERVER, flags="S", seq=n) for n in range(flows)]
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(3 * flows):
            packet = packets[number % flows]
            packet._headers = None  # noqa: SLF001  # what is kept is what is bounded
            element.decide(packet, table.observe(packet.headers.five_tuple, 1.0 + number * 1e-4))
            packet._headers = None  # noqa: SLF001  # what is kept is what is bounded
        per_flow = (tracemalloc.get_traced_memory()[0] - before) / flows
    finally:
        tracemalloc.stop()
    assert len(table) <= flows
    assert 300 < per_flow < 1229, per_flow
