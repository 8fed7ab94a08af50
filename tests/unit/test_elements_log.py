"""The five-tuple log's lines, fields and limits."""

from __future__ import annotations

import socket
import struct
from typing import Any

from openings import client_hello, dns_query

from nfq_agent.elements.log import FiveTupleLog, LogOptions
from nfq_agent.flow import Flow
from nfq_agent.packet import Hook, Packet
from nfq_agent.testing import Bench, tcp, udp
from nfq_agent.verdict import ACCEPT, DROP, Action, Verdict


class Said:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, message: str, **fields: Any) -> None:
        self.events.append((message, fields))

    @property
    def lines(self) -> list[str]:
        return [message for message, _ in self.events]


def element(**options: Any) -> tuple[FiveTupleLog, Said]:
    said = Said()
    return FiveTupleLog("log", LogOptions(**options), said), said


def v4(protocol: int, rest: bytes, src: str = "127.0.0.1", dst: str = "127.0.0.1", fragment: int = 0) -> bytes:
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(rest), 1, fragment, 64, protocol, 0)
    return header + socket.inet_aton(src) + socket.inet_aton(dst) + rest


def v6(following: int, rest: bytes, src: str = "::1", dst: str = "::1") -> bytes:
    header = struct.pack("!IHBB", 6 << 28, len(rest), following, 64)
    return header + socket.inet_pton(socket.AF_INET6, src) + socket.inet_pton(socket.AF_INET6, dst) + rest


TCP = struct.pack("!HHIIBBHHH", 40000, 11000, 1, 0, 0x50, 2, 1000, 0, 0)
UDP = struct.pack("!HHHH", 5353, 53, 12, 0) + b"name"


def line(payload: bytes, verdict: Verdict = ACCEPT, **packet: Any) -> str:
    log, said = element()
    log.judged(Packet(payload, **packet), None, verdict)
    (text,) = said.lines
    return text


def test_tcp_over_ipv4_with_its_fields() -> None:
    log, said = element()
    log.judged(Packet(v4(6, TCP), mark=0x10, uid=33), None, ACCEPT)
    assert said.events == [
        (
            "tcp 127.0.0.1:40000 -> 127.0.0.1:11000 INPUT accept, 40 bytes",
            {
                "hook": "INPUT", "verdict": "accept", "length": 40, "mark": "0x10", "uid": 33, "proto": "tcp",
                "src": "127.0.0.1", "sport": 40000, "dst": "127.0.0.1", "dport": 11000,
            },
        )
    ]  # fmt: skip


def test_udp_over_ipv6_behind_extension_headers() -> None:
    hop_by_hop = bytes((60, 0)) + bytes(6)
    destination = bytes((17, 1)) + bytes(14)
    text = line(v6(0, hop_by_hop + destination + UDP), DROP, hook=Hook.OUTPUT)
    assert text == "udp [::1]:5353 -> [::1]:53 OUTPUT drop, 76 bytes"


def test_what_is_known_of_the_flow_is_said_once_it_is_known() -> None:
    bench = Bench("log", before=[("dpi", {}), ("policy", {"default": "drop", "rule": [{"action": "accept", "tls_sni": "a.*"}]})])
    client, server = "192.0.2.1:40000", "198.51.100.1:443"
    bench.decide(tcp(client, server, flags="S", seq=9))
    bench.decide(tcp(client, server, client_hello("a.server.test"), seq=10))
    bench.decide(tcp(server, client, flags="A"))
    bench.decide(udp("192.0.2.1:5000", "198.51.100.1:53", dns_query("b.test", 28)))
    syn, hello, answer, query = bench.said
    assert syn.message.endswith(" accept, 40 bytes")
    assert syn.fields["dpi"] == "undecided"
    assert "tls_sni" not in syn.fields
    for event in (hello, answer):
        assert event.message.endswith(" bytes, tls a.server.test, by policy: rule 1")
        assert event.fields["tls_sni"] == "a.server.test"
        assert event.fields["verdict"] == "accept"
    assert hello.fields["ja3"]
    assert query.message.endswith(" drop, 52 bytes, dns b.test, by policy: default")
    assert (query.fields["dns_name"], query.fields["dns_type"]) == ("b.test", "AAAA")


def test_no_fact_takes_the_place_of_what_the_packet_says() -> None:
    log, said = element()
    packet = Packet(v4(6, TCP))
    facts = {"src": "x", "verdict": "x", "message": "x", "level": "x", "self": "x", "country": ("a", 1)}
    log.judged(packet, Flow(packet.headers.five_tuple, 0.0, 0.0, facts=facts), ACCEPT)
    ((message, fields),) = said.events
    assert message == "tcp 127.0.0.1:40000 -> 127.0.0.1:11000 INPUT accept, 40 bytes"
    assert (fields["src"], fields["verdict"], fields["country"]) == ("127.0.0.1", "accept", "a 1")
    assert "message" not in fields


def test_a_later_fragment_has_no_port() -> None:
    assert line(v4(17, UDP, fragment=100)) == "udp 127.0.0.1 -> 127.0.0.1 INPUT accept, 32 bytes, fragment"
    assert line(v6(44, bytes((17, 0)) + struct.pack("!HI", 800, 7) + UDP)) == "udp ::1 -> ::1 INPUT accept, 60 bytes, fragment"


def test_a_first_fragment_has_its_ports() -> None:
    assert line(v4(17, UDP, fragment=0x2000)) == "udp 127.0.0.1:5353 -> 127.0.0.1:53 INPUT accept, 32 bytes, fragment"


def test_other_protocols_by_name_or_number() -> None:
    assert line(v4(1, bytes(8))) == "icmp 127.0.0.1 -> 127.0.0.1 INPUT accept, 28 bytes"
    assert line(v6(58, bytes(8))) == "icmpv6 ::1 -> ::1 INPUT accept, 48 bytes"
    assert line(v4(47, bytes(8))) == "gre 127.0.0.1 -> 127.0.0.1 INPUT accept, 28 bytes"
    assert line(v4(253, bytes(8))) == "proto-253 127.0.0.1 -> 127.0.0.1 INPUT accept, 28 bytes"


def test_a_malformed_packet_says_so() -> None:
    assert line(v4(6, TCP)[:15], DROP) == "malformed packet: IPv4 header cut at 15 bytes; INPUT drop, 15 bytes"


def test_a_verdict_with_more_to_it() -> None:
    assert "INPUT accept mark 0x7 rewritten," in line(v4(6, TCP), Verdict(Action.ACCEPT, mark=7, payload=v4(6, TCP)))
    assert "INPUT queue 9," in line(v4(6, TCP), Verdict(Action.QUEUE, queue=9))


def test_metadata_alone_is_said_to_be_degraded_once() -> None:
    log, said = element()
    loopback = socket.if_nametoindex("lo")
    for _ in range(2):
        log.judged(Packet(b"", mark=0x10, indev=loopback), None, ACCEPT)
    warning, first, second = said.events
    assert warning[0].startswith('log: degraded: with copy = "meta"')
    assert warning[1] == {"level": "warning"}
    expected = {"hook": "INPUT", "verdict": "accept", "length": 0, "mark": "0x10", "indev": "lo"}
    assert first == second == ("packet INPUT in lo mark 0x10 accept", expected)


def test_the_rate_is_kept_and_suppressed_lines_are_counted() -> None:
    log, said = element(per_second=10, burst=5)
    for step in range(2000):
        log.judged(Packet(v4(6, TCP), time=1000.0 + step / 100), None, ACCEPT)
    packets = [text for text in said.lines if text.startswith("tcp ")]
    summaries = [fields["suppressed"] for message, fields in said.events if "not logged" in message]
    assert 5 + 195 <= len(packets) <= 5 + 201
    assert len(summaries) == 1
    log.stop()
    summaries = [fields["suppressed"] for message, fields in said.events if "not logged" in message]
    assert len(packets) + sum(summaries) == 2000
    log.stop()
    assert len(summaries) == 2


def test_no_limit() -> None:
    log, said = element(per_second=0)
    for _ in range(5000):
        log.judged(Packet(v4(6, TCP)), None, ACCEPT)
    assert len(said.events) == 5000
