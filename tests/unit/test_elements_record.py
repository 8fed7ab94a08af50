"""`record`: a flow's records, their figures, and what begins and ends a flow."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from log_lines import SCHEMA, VALIDATOR
from openings import client_hello, dns_query

from nfq_agent.flow import Account, Flow
from nfq_agent.flow_table import FlowTable
from nfq_agent.packet import Packet
from nfq_agent.protocols.known import OWNERS
from nfq_agent.testing import Bench, tcp, udp
from nfq_agent.verdict import ACCEPT

CLIENT, SERVER = "10.0.0.1:40001", "192.0.2.7:443"
ALLOW = {"default": "drop", "rule": [{"action": "accept", "tls_sni": "*.good.test"}]}
HELLO = client_hello("a.good.test")
TOP = Path(__file__).resolve().parents[2]


def bench(**options: Any) -> Bench:
    return Bench("record", before=[("dpi", {}), ("policy", ALLOW)], **options)


def records(of: Bench) -> list[Mapping[str, Any]]:
    return [line.fields for line in of.said if "event" in line.fields]


def pass_through(of: Bench, *packets: Packet) -> None:
    for packet in packets:
        of.decide(packet)


def opened(hello: bytes = HELLO, seq: int = 1) -> list[Packet]:
    return [
        tcp(CLIENT, SERVER, flags="S", seq=seq),
        tcp(SERVER, CLIENT, flags="SA", seq=100, ack=seq + 1),
        tcp(CLIENT, SERVER, flags="A", seq=seq + 1, ack=101),
        tcp(CLIENT, SERVER, hello, seq=seq + 1, ack=101),
    ]


def closed(seq: int) -> list[Packet]:
    return [
        tcp(CLIENT, SERVER, flags="FA", seq=seq, ack=101),
        tcp(SERVER, CLIENT, flags="FA", seq=101, ack=seq + 1),
        tcp(CLIENT, SERVER, flags="A", seq=seq + 1, ack=102),
    ]


def test_a_connection_from_its_verdict_to_its_end() -> None:
    run = bench()
    packets = [*opened(), *closed(2 + len(HELLO))]
    pass_through(run, *packets)
    (begin,) = records(run)
    assert dict(begin).items() >= {
        "event": "begin", "verdict": "accept", "tls_sni": "a.good.test", "protocol": "tls", "reason": "policy: rule 1",
        "element": "policy", "rule": "rule 1", "src": "10.0.0.1", "dport": 443,
    }.items()  # fmt: skip
    run.wait(2.0)
    _, end = records(run)
    assert (end["event"], end["end"], end["duration"]) == ("end", "closed", 0.0)
    sent = [packet for packet in packets if packet.headers.five_tuple.sport == 40001]
    received = [packet for packet in packets if packet.headers.five_tuple.sport == 443]
    assert (end["pkts_toserver"], end["bytes_toserver"]) == (len(sent), sum(packet.length for packet in sent))
    assert (end["pkts_toclient"], end["bytes_toclient"]) == (len(received), sum(packet.length for packet in received))
    # Nothing more is recorded of it, also when the table forgets it and the worker stops.
    run.wait(400.0)
    run.stop()
    assert len(records(run)) == 2


def test_a_drop_and_what_monitor_mode_would_drop() -> None:
    run = bench()
    pass_through(run, *opened(client_hello("bad.test")))
    (record,) = records(run)
    assert (record["verdict"], record["reason"], record["event"]) == ("drop", "policy: default", "begin")
    assert run.lines == ["flow begin tcp 10.0.0.1:40001 -> 192.0.2.7:443: drop, tls bad.test, by policy: default"]


@pytest.mark.parametrize(
    ("options", "events"),
    [
        ({}, ["begin", "end"]),
        ({"events": "end"}, ["end"]),
        ({"events": "begin"}, ["begin"]),
        ({"only": "drop"}, []),
    ],
)
def test_which_records_are_made(options: dict[str, Any], events: list[str]) -> None:
    run = bench(**options)
    pass_through(run, *opened(), tcp(SERVER, CLIENT, flags="RA", seq=101, ack=5))
    run.wait(2.0)
    assert [record["event"] for record in records(run)] == events


def test_a_flow_without_an_end_ends_when_it_is_forgotten() -> None:
    run = bench()
    run.decide(udp("10.0.0.1:5353", "192.0.2.53:53", dns_query("a.good.test")))
    run.now += 3.0
    run.decide(udp("192.0.2.53:53", "10.0.0.1:5353", b"x" * 20))
    run.wait(299.0)
    assert [record["event"] for record in records(run)] == ["begin"]
    run.wait(20.0)
    end = records(run)[-1]
    assert (end["event"], end["end"], end["duration"], end["pkts_toserver"], end["pkts_toclient"]) == ("end", "idle", 3.0, 1, 1)


def test_a_flow_that_is_left_ends_with_the_worker() -> None:
    run = bench()
    pass_through(run, *opened())
    run.stop()
    assert [record.get("end") for record in records(run)] == [None, "stopped"]


def test_a_new_connection_on_the_same_ports_is_a_record_of_its_own() -> None:
    run = bench()
    pass_through(run, *opened(), *closed(2 + len(HELLO)), *opened(client_hello("bad.test"), seq=500000))
    begin, end, second = records(run)
    assert (begin["event"], end["event"], second["event"]) == ("begin", "end", "begin")
    assert (end["end"], end["pkts_toserver"], end["pkts_toclient"]) == ("closed", 5, 2)
    assert (second["verdict"], second["tls_sni"]) == ("drop", "bad.test")
    run.stop()
    assert records(run)[-1]["pkts_toserver"] == 3


def test_a_connection_without_an_end_is_replaced_by_the_next_on_its_ports() -> None:
    run = bench()
    pass_through(run, *opened(), *opened(client_hello("bad.test"), seq=500000))
    assert [(each["event"], each.get("end"), each["tls_sni"]) for each in records(run)] == [
        ("begin", None, "a.good.test"), ("end", "replaced", "a.good.test"), ("begin", None, "bad.test"),
    ]  # fmt: skip


def test_a_syn_within_a_connection_ends_no_record() -> None:
    run = bench()
    pass_through(
        run, *opened(), tcp(CLIENT, SERVER, flags="S", seq=7777), tcp(CLIENT, SERVER, b"more", seq=2 + len(HELLO), ack=101)
    )
    run.stop()
    assert [(record["event"], record["pkts_toserver"]) for record in records(run)] == [("begin", 3), ("end", 5)]


def test_a_flow_that_is_not_decided_has_a_record_soon() -> None:
    run = Bench("record", before=[("dpi", {}), ("policy", {**ALLOW, "within": 100})])
    pass_through(run, *opened(b""), *(tcp(CLIENT, SERVER, b"", flags="A", seq=2) for _ in range(8)))
    assert [record["event"] for record in records(run)] == ["begin"]


def test_a_connection_of_which_the_first_packet_alone_is_shown_has_a_record_soon() -> None:
    run = Bench("record", before=[("policy", {"default": "drop", "rule": [{"action": "accept", "dport": 443}]})])
    run.decide(tcp(CLIENT, SERVER, flags="S", seq=1))
    assert not records(run)
    run.wait(2.0)
    (begin,) = records(run)
    assert (begin["event"], begin["verdict"], begin["reason"]) == ("begin", "accept", "policy: rule 1")
    run.wait(2.0)
    run.stop()
    assert [each["event"] for each in records(run)] == ["begin", "end"]


def test_a_turned_verdict_is_told() -> None:
    run = Bench(
        "record", before=[("dpi", {}), ("policy", {"default": "drop", "rule": [{"action": "accept", "http_host": "a.test"}]})]
    )
    first, second = (f"GET / HTTP/1.1\r\nHost: {host}.test\r\n\r\n".encode() for host in "ab")
    pass_through(run, *opened(first), tcp(CLIENT, SERVER, second, seq=2 + len(first), ack=101))
    assert [(record["event"], record["verdict"]) for record in records(run)] == [("begin", "accept"), ("change", "drop")]


def test_the_end_has_the_rule_of_the_name_that_it_has() -> None:
    table = {"default": "drop", "rule": [{"action": "accept", "http_host": f"{host}.test"} for host in "ab"]}
    run = Bench("record", before=[("dpi", {}), ("policy", table)])
    first, second = (f"GET / HTTP/1.1\r\nHost: {host}.test\r\n\r\n".encode() for host in "ab")
    pass_through(run, *opened(first), tcp(CLIENT, SERVER, second, seq=2 + len(first), ack=101))
    run.stop()
    assert [(record["event"], record["http_host"], record["rule"]) for record in records(run)] == [
        ("begin", "a.test", "rule 1"), ("end", "b.test", "rule 2"),
    ]  # fmt: skip


def test_the_reset_of_a_rejected_connection_does_not_make_it_accepted() -> None:
    run = Bench("record", before=[("dpi", {}), ("policy", {**ALLOW, "default": "reject"})])
    pass_through(run, *opened(client_hello("bad.test")))
    reset = tcp(SERVER, CLIENT, flags="R", seq=101)
    assert run.decide(reset) is ACCEPT
    run.wait(2.0)
    assert [(each["event"], each["verdict"], each["reason"]) for each in records(run)] == [
        ("begin", "reject", "policy: default"), ("end", "reject", "policy: default"),
    ]  # fmt: skip


def test_records_beyond_the_rate_are_counted() -> None:
    run = Bench("record", per_second=5)
    for port in range(50):
        run.decide(udp(f"10.0.0.1:{1000 + port}", "192.0.2.53:9"))
    assert len(records(run)) == 5
    run.stop()
    assert sum(line.fields.get("suppressed", 0) for line in run.said) == 50 - 5 + 50


def test_without_a_rate_every_record_is_made() -> None:
    run = Bench("record", per_second=0)
    for port in range(50):
        run.decide(udp(f"10.0.0.1:{1000 + port}", "192.0.2.53:9"))
    run.stop()
    assert [record["event"] for record in records(run)] == ["begin"] * 50 + ["end"] * 50


def test_every_field_is_documented() -> None:
    run = bench()
    pass_through(run, *opened(client_hello("bad.test")), tcp(SERVER, CLIENT, flags="RA", seq=101, ack=5))
    run.wait(2.0)
    page = (TOP / "docs/elements.md").read_text()
    section = page.partition("### record\n")[2].partition("\n### ")[0]
    facts = set(OWNERS) | {"protocol"}
    assert not [name for record in records(run) for name in record if name not in facts and f"`{name}`" not in section]


def test_packets_that_no_element_has_to_be_shown_are_counted_too() -> None:
    table = FlowTable()
    table.keep_forgotten()
    packets = [udp(CLIENT, "192.0.2.7:9", b"x" * size) for size in range(20)] + [udp("192.0.2.7:9", CLIENT, b"y" * 100)]
    flow = table.observe(packets[0].headers.five_tuple, 1.0, packets[0].length)
    table.settle(0, flow, ACCEPT)
    assert all(table.look_up(packet.payload, packet.length, 2.0) is ACCEPT for packet in packets[1:])
    expected = Account(20, sum(packet.length for packet in packets[:20]), 1, packets[20].length, 2.0)
    assert table.account(flow) == expected
    assert table.flows() == [(flow, expected)]
    assert table.take_forgotten(300.0) == []
    assert table.take_forgotten(303.0) == [(flow, expected)]
    assert table.take_forgotten(303.0) == []
    assert table.account(flow) is None
    assert len(table) == 0


def test_many_old_flows_are_forgotten_a_few_at_a_time() -> None:
    table = FlowTable()
    table.keep_forgotten()
    made: list[Flow] = [table.observe(udp(f"10.0.0.1:{port}", SERVER).headers.five_tuple, 1.0) for port in range(1, 51)]
    rounds = list(itertools.takewhile(bool, (table.take_forgotten(1000.0, 20) for _ in range(9))))
    assert [len(each) for each in rounds] == [20, 20, 10]
    assert [flow for each in rounds for flow, _ in each] == made


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"verdict": "would drop"}, "is not one of"),
        ({"event": "end"}, "'end' is a required property"),
        ({"sport": "x"}, "not of type"),
        ({"tap": "web"}, "is valid under each of"),
        ({"event": "drop"}, "'reason' is a required property"),
        ({"would": "drop", "verdict": "drop"}, "'accept' was expected"),
    ],
)
def test_a_record_that_does_not_fit_is_found(change: dict[str, object], wrong: str) -> None:
    record = {
        "time": "2026-01-01T00:00:00Z", "level": "info", "message": "", "event": "begin", "proto": "tcp", "src": "192.0.2.1",
        "sport": 1, "dst": "192.0.2.2", "dport": 2, "verdict": "accept", "start": "2026-01-01T00:00:00Z", "duration": 0.1,
        "pkts_toserver": 1, "bytes_toserver": 60, "pkts_toclient": 0, "bytes_toclient": 0, "hook": "OUTPUT", "queue": 7,
        "instance": "default",
    }  # fmt: skip
    VALIDATOR.check_schema(SCHEMA)
    VALIDATOR.validate(record)
    assert wrong in str(next(VALIDATOR.iter_errors(record | change)))
