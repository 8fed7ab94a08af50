"""What an exporter makes of the records of flows: periods, IPFIX messages, lines, and what it counts."""

from __future__ import annotations

import json
import math
import signal
import socket
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfq_agent.cli import export
from nfq_agent.cli.export_output import FlowOutput, output
from nfq_agent.flow_filter import parse
from nfq_agent.flow_lines import FlowLines
from nfq_agent.flow_periods import FlowPeriods
from nfq_agent.flow_report import FlowReport, PeriodEnd
from nfq_agent.ipfix import DATAGRAM, EXAMPLE, IpfixSession
from nfq_agent.service import control, rights


def told(kind: str = "flow", packets: int = 1, first: float = 10.0, **more: Any) -> dict[str, Any]:
    """A record as the agent tells it."""
    record: dict[str, Any] = {
        "kind": kind, "queue": 7, "proto": "tcp", "src": "10.0.0.1", "sport": 5, "dst": "10.0.0.2", "dport": 443,
        "pkts_toserver": packets, "bytes_toserver": 100 * packets, "pkts_toclient": 0, "bytes_toclient": 0,
        "first": first, "duration": 1.0, "verdict": "accept", "reason": "egress: rule 1", "tls_sni": "a.test",
    }  # fmt: skip
    return record | more


def periods(what: str = "", **more: Any) -> FlowPeriods:
    return FlowPeriods(parse(what), 5.0, 60.0, 15.0, **more)


def summed(reports: list[FlowReport]) -> list[tuple[int, str]]:
    return [(report.passed.packets_sent, report.why.name) for report in reports]


def test_a_flow_is_reported_by_its_periods() -> None:
    made = periods()
    assert [*made.add("default", [told(packets=2)], 10.0)] == []
    assert summed([*made.add("default", [told(packets=7)], 71.0)]) == [(7, "active")]
    assert [*made.add("default", [told(packets=9)], 72.0)] == []
    assert summed([*made.due(90.0)]) == [(2, "idle")]
    # It continues: only what is new is reported.
    assert summed([*made.add("default", [told("end", packets=10)], 95.0)]) == [(1, "ended")]
    assert [*made.due(200.0)] == []


def test_what_passed_before_the_export_is_not_reported() -> None:
    made = periods()
    assert [*made.add("default", [told(packets=1000, first=1.0)], 10.0)] == []
    assert summed([*made.add("default", [told("end", packets=1001, first=1.0)], 11.0)]) == [(1, "ended")]


def test_another_flow_with_the_same_ports_is_another_record() -> None:
    made = periods()
    assert [*made.add("default", [told(packets=3)], 10.0)] == []
    assert summed([*made.add("default", [told(packets=2, first=20.0)], 21.0)]) == [(3, "ended")]
    assert summed([*made.finish()]) == [(2, "stopped")]


def test_flows_are_bounded_and_what_has_no_figures_is_counted() -> None:
    made = periods(most=2)
    assert [*made.add("default", [told(sport=number) for number in range(4)], 10.0)] == []
    assert summed([*made.due(10.0)]) == [(1, "full"), (1, "full")]
    ended = {name: value for name, value in told("end", sport=9).items() if not name.startswith(("pkts", "bytes"))}
    assert [*made.add("default", [ended, {"kind": "packet"}], 11.0)] == []
    assert made.missed == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"src": None}, {"src": 5}, {"src": "x"}, {"dst": "2001:db8::1"}, {"sport": "5"}, {"sport": -1}, {"dport": 65536},
        {"proto": "proto-x"}, {"proto": ["tcp"]}, {"first": math.nan}, {"first": math.inf}, {"duration": math.inf},
        {"duration": "long"}, {"bytes_toserver": -1}, {"bytes_toserver": 1 << 64}, {"pkts_toserver": 1.5},
        {"pkts_toserver": True},
    ],
)  # fmt: skip
def test_a_record_that_no_report_could_say_is_counted(wrong: dict[str, Any]) -> None:
    made = periods()
    assert [*made.add("default", [told() | wrong, told(sport=6)], 10.0)] == []
    found = [*made.finish()]
    assert (made.missed, len(found)) == (1, 1)
    for encoding in (IpfixSession(), FlowLines()):
        assert sum(count for _, count in encoding.blocks(found, 0.0, DATAGRAM)) == 1


def test_totals_that_fall_are_counted() -> None:
    made = periods()
    assert summed([*made.add("default", [told(packets=7), told(packets=8)], 10.0), *made.due(26.0)]) == [(8, "idle")]
    assert summed([*made.add("default", [told("end", packets=2)], 27.0)]) == []
    assert made.missed == 1


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text() | st.integers(), st.lists, max_leaves=5))
def test_any_value_of_any_key_is_reported_or_counted(value: Any) -> None:
    for key in (*told(), "would", "unit", "container", "protocol"):
        made = periods("name ~ *.test and verdict = accept or dport < 5")
        found = [*made.add("default", [told() | {key: value}], 10.0), *made.finish()]
        for encoding in (IpfixSession(), FlowLines()):
            assert sum(count for _, count in encoding.blocks(found, 0.0, DATAGRAM)) == len(found), key


def test_the_filter_is_of_the_whole_record() -> None:
    made = periods("verdict = drop")
    records = [told("end", sport=1), told("end", sport=2, verdict="drop")]
    assert [report.record["sport"] for report in made.add("default", records, 10.0)] == [2]


def reports(number: int = 1, **more: Any) -> list[FlowReport]:
    made = periods()
    made.epoch = 1000.0
    return [*made.add("default", [told("end", sport=port, **more) for port in range(number)], 10.0)]


def sets(message: bytes) -> dict[int, bytes]:
    """The sets of a message by their ids; fails if the lengths do not add up."""
    version, length, *_ = struct.unpack_from("!HHIII", message)
    assert (version, length) == (10, len(message))
    found, at = {}, 16
    while at < length:
        number, size = struct.unpack_from("!HH", message, at)
        found[number] = message[at + 4 : at + size]
        at += size
    assert at == length
    return found


def test_templates_and_records_fit_each_other() -> None:
    session = IpfixSession()
    templates = sets(session.begin(5.0))
    number, count = struct.unpack_from("!HH", templates[2])
    assert number == 256
    lengths, at = [], 4
    for _ in range(count):
        field, length = struct.unpack_from("!HH", templates[2], at)
        at += 8 if field & 0x8000 else 4
        lengths.append(length)
    (message, records), *rest = session.blocks(reports(), 5.0)
    assert (records, rest) == (1, [])
    data, at, texts = sets(message)[256], 0, []
    for length in lengths:
        if length == 0xFFFF:
            texts.append(data[at + 1 : at + 1 + data[at]].decode())
            length = 1 + data[at]
        at += length
    assert at == len(data)
    assert texts == ["default", "queue 7", "accept", "", "egress: rule 1", "", "", "", "a.test"]
    assert struct.unpack_from("!QQ", data) == (1_010_000, 1_011_000)
    assert EXAMPLE.to_bytes(4, "big") in templates[2]


def test_messages_fit_into_a_datagram_and_count_their_records() -> None:
    session = IpfixSession(domain=3)
    many = reports(50, tls_sni="n" * 300, reason="ä" * 300, unit="u" * 300) + reports(1, src="fd00::1", dst="fd00::2")
    expected = 0
    for message, records in session.blocks(many, 5.0):
        assert len(message) <= DATAGRAM
        assert struct.unpack_from("!II", message, 8) == (expected, 3)
        expected += records
        sets(message)
    assert expected == 51
    assert struct.unpack_from("!IQQ", sets(session.statistics(7, 51, 2, 5.0))[258]) == (7, 51, 2)
    assert struct.unpack_from("!I", session.begin(5.0), 8) == (0,)


def test_what_is_not_known_is_zero_or_empty() -> None:
    unknown = {"kind": "flow", "proto": "proto-200", "src": "10.0.0.1", "dst": "10.0.0.2"}
    report = FlowReport("default", unknown, 0.0, 0.0, reports()[0].passed, PeriodEnd.idle)
    data = sets(next(iter(IpfixSession().blocks([report], 0.0)))[0])[256]
    assert data[24:29] == bytes((0, 0, 0, 0, 200))
    assert (report.name, report.point) == ("", "")


class Collector:
    """A TCP or UDP socket that keeps what comes."""

    def __init__(self, kind: socket.SocketKind) -> None:
        self.socket = socket.socket(socket.AF_INET, kind)
        self.socket.bind(("127.0.0.1", 0))
        self.target = f"{'tcp' if kind == socket.SOCK_STREAM else 'udp'}://127.0.0.1:{self.socket.getsockname()[1]}"


def test_outputs(tmp_path: Path) -> None:
    file = output(str(tmp_path / "flows"), FlowLines())
    file.write(reports(2), 5.0)
    assert [json.loads(line)["sport"] for line in (tmp_path / "flows").read_text().splitlines()] == [0, 1]
    datagrams = Collector(socket.SOCK_DGRAM)
    udp = output(datagrams.target, IpfixSession())
    udp.write(reports(2), 5.0)
    udp.write(reports(), 100.0)
    received = [sets(datagrams.socket.recv(2000)) for _ in range(4)]
    assert [list(each) for each in received] == [[2, 3], [256], [2, 3], [256]]
    stream = Collector(socket.SOCK_STREAM)
    stream.socket.listen()
    tcp = output(stream.target, FlowLines())
    tcp.write(reports(), 5.0)
    connection, _ = stream.socket.accept()
    assert json.loads(connection.recv(2000))["tls_sni"] == "a.test"
    assert [each.exported for each in (file, udp, tcp)] == [2, 3, 1]
    for each in (connection, stream.socket, datagrams.socket, tcp, udp):
        each.close()


def test_what_cannot_be_written_is_lost_and_counted(tmp_path: Path) -> None:
    stream = Collector(socket.SOCK_STREAM)
    refused = output(stream.target, FlowLines())
    refused.write(reports(3), 5.0)
    assert (refused.lost, refused.problem) == (3, f"{stream.target}: Connection refused")
    stream.socket.close()
    nowhere = output(str(tmp_path / "no" / "folder"), IpfixSession())
    nowhere.write(reports(3), 5.0)
    assert (nowhere.exported, nowhere.lost) == (0, 3)


@pytest.mark.parametrize("target", ["", "http://a:1", "udp://a", "tcp://a:0"])
def test_a_wrong_target_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match="allowed"):
        output(target, FlowLines())


def exporter(out: FlowOutput) -> export.Exporter:
    return export.Exporter(out, periods())


def test_the_exporter_counts_what_the_agent_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = {"ok": True, "records": [told("end")], "places": {}, "missed": 3}
    monkeypatch.setattr(control, "ask", lambda *_: answer)
    made = exporter(output(str(tmp_path / "flows"), FlowLines()))
    made.turn(["default"])
    made.finish()
    flow, figures = map(json.loads, (tmp_path / "flows").read_text().splitlines())
    assert (flow["event"], flow["end"]) == ("flow", "ended")
    assert (figures["exported"], figures["missed"]) == (1, 3)
    answer |= {"ok": False, "message": "no"}
    made.turn(["default"])
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"nfq-agent: the flows of instance default go to {tmp_path}/flows",
        "nfq-agent: 3 records of flows were missed (3 in all)",
        "nfq-agent: no",
    ]


def test_the_last_flows_are_written_when_the_exporter_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It began after the exporter did.
    answers = iter(([], [told("end", first=time.monotonic() + 60)]))
    monkeypatch.setattr(control, "ask", lambda *_: {"ok": True, "records": next(answers), "places": {}, "missed": 0})
    before = signal.getsignal(signal.SIGTERM)

    def stop(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nfq_agent.cli.export.time.sleep", stop)
    try:
        assert export.export("default", FlowLines(), str(tmp_path / "flows"), "", (60.0, 15.0)) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    flow, figures = map(json.loads, (tmp_path / "flows").read_text().splitlines())
    assert (flow["event"], flow["end"], figures["exported"]) == ("flow", "ended", 1)


def test_a_wrong_filter_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert export.export(None, FlowLines(), "-", "nam = x", (1.0, 1.0)) == 2
    assert "'nam' is not a field" in capsys.readouterr().err


def test_the_agents_own_user_may_ask_everything() -> None:
    one, other = socket.socketpair()
    with one, other:
        assert rights.refusal(one, "reload") == ""
    assert rights.group_id("no-such-group") is None
