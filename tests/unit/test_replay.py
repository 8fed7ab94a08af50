"""`replay` lends the elements what a worker does: the mode for connections that began before, what was decided, names of DNS."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from mmdb import write_database
from openings import client_hello, dns_query
from recorded import BEGIN, connection, piped, write, write_ng

from nfq_agent.capture.recording import Recorded
from nfq_agent.cli import replay
from nfq_agent.cli.flags import Flags
from nfq_agent.cli.judging import Judging, key_of
from nfq_agent.cli.sighting import Fate
from nfq_agent.config.file import load
from nfq_agent.elements.dpi import Dpi
from nfq_agent.flow import Flow
from nfq_agent.packet import Packet
from nfq_agent.testing import icmp, tcp, udp
from nfq_agent.verdict import Verdict

CONFIG = """
agent.resolvers = ["192.0.2.53"]
[queue.main]
num = 7
elements = ["dpi", "allow"]
midstream = "{midstream}"
[rules.web]
queue = "main"
hooks = ["output", "input"]
all = true
[element.allow]
type = "policy"
default = "drop"
[[element.allow.rule]]
action = "accept"
protocol = "dns"
[[element.allow.rule]]
action = "accept"
tls_sni = ["*.good.test"]
{verify}
"""
CLIENT, SERVER, RESOLVER = "10.0.0.1:40001", "192.0.2.7:443", "192.0.2.53:53"
HELLO = client_hello("a.good.test")


def answer(name: str, address: str, seconds: int = 60) -> bytes:
    """An answer with one address."""
    message = dns_query(name, flags=0x8180)
    record = struct.pack("!HHHIH", 0xC00C, 1, 1, seconds, 4) + ip_address(address).packed
    return message[:6] + b"\0\1" + message[8:] + record


def asked(name: str, address: str) -> list[Packet]:
    return [udp("10.0.0.1:5353", RESOLVER, dns_query(name)), udp(RESOLVER, "10.0.0.1:5353", answer(name, address))]


def flows(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    packets: Iterable[tuple[float, Packet]],
    midstream: str = "accept",
    verify: str = "",
) -> list[tuple[str, bool]]:
    """The fate of each flow of TCP, and whether the capture lacks its beginning."""
    config = folder / "agent.toml"
    config.write_text(CONFIG.format(midstream=midstream, verify=verify))
    write(folder / "seen.pcap", packets)
    replay.replay(Flags(config), folder / "seen.pcap", None, False, True)
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return [(flow["after"], flow["midstream"]) for flow in told["flows"] if flow["flow"].startswith("tcp")]


def apart(packets: Iterable[Packet], begin: float = 0.0) -> list[tuple[float, Packet]]:
    return [(BEGIN + begin + number / 1000, packet) for number, packet in enumerate(packets)]


@pytest.mark.parametrize(("midstream", "fate"), [("accept", "accept"), ("judge", "drop"), ("drop", "drop")])
def test_a_connection_that_began_before_the_capture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], midstream: str, fate: str
) -> None:
    late = apart(tcp(CLIENT, SERVER, b"\x17\x03\x03\0\x10" + bytes(16), seq=1 + 21 * number) for number in range(12))
    assert flows(tmp_path, capsys, late, midstream) == [(fate, True)]


def test_a_person_reads_that_flows_began_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "agent.toml"
    config.write_text(CONFIG.format(midstream="accept", verify=""))
    write(tmp_path / "seen.pcap", apart([tcp(CLIENT, SERVER, b"\0\1", seq=5)]))
    replay.replay(Flags(config), tmp_path / "seen.pcap", None, False, False)
    assert "1 flow began before the capture; `midstream` of its queue says how it is judged" in capsys.readouterr().out


def test_a_decided_connection_is_known_when_it_goes_on_after_an_hour(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = apart(connection(CLIENT, SERVER, HELLO))
    on = apart([tcp(CLIENT, SERVER, b"\x17\x03\x03\0\1x", seq=2 + len(HELLO), ack=2)], 3600.0)
    assert flows(tmp_path, capsys, begun + on, "drop") == [("accept", False)]


def test_a_name_counts_as_far_as_an_answer_of_the_capture_proves_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = apart([*asked("a.good.test", "192.0.2.7"), *connection(CLIENT, SERVER, HELLO)])
    assert flows(tmp_path, capsys, said, verify='verify = "dns"') == [("accept", False)]
    other = apart([*asked("a.good.test", "192.0.2.8"), *connection(CLIENT, SERVER, HELLO)])
    assert flows(tmp_path, capsys, other, verify='verify = "dns"') == [("drop", False)]
    # The answer holds for a time.
    late = apart(asked("a.good.test", "192.0.2.7")) + apart(connection(CLIENT, SERVER, HELLO), 3600.0)
    assert flows(tmp_path, capsys, late, verify='verify = "dns"') == [("drop", False)]


def test_places_of_a_database_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_database(tmp_path / "places.mmdb", {"192.0.2.0/24": {"country": "DE", "asn": "AS64500"}})
    config = tmp_path / "agent.toml"
    text = CONFIG.format(midstream="accept", verify="").partition("[element.allow]")[0]
    config.write_text(
        f"""{text}[element.allow]
type = "policy"
geo = "places.mmdb"
default = "drop"
rule = [{{ action = "accept", dst_country = "DE" }}, {{ action = "accept", src_asn = 64500 }}]
"""
    )
    elsewhere = "198.51.100.7:443"
    write(tmp_path / "seen.pcap", apart([*connection(CLIENT, SERVER, HELLO), *connection(CLIENT, elsewhere, HELLO)]))
    replay.replay(Flags(config), tmp_path / "seen.pcap", None, False, True)
    told = json.loads(capsys.readouterr().out)
    assert {flow["flow"].partition(" -> ")[2]: flow["after"] for flow in told["flows"]} == {SERVER: "accept", elsewhere: "drop"}


def mixed() -> list[tuple[float, Packet]]:
    """Connections, some late or with other names, datagrams, IPv6, and what follows a decision."""
    found = []
    for number in range(12):
        client = f"10.0.0.{number}:{40000 + number}" if number % 3 else f"[2001:db8::{number + 1}]:{40000 + number}"
        server = SERVER if number % 3 else "[2001:db8::99]:443"
        hello = client_hello(("a.good.test", "b.evil.test")[number % 4 == 3])
        packets = list(connection(client, server, hello))
        end = 2 + len(hello)
        packets += [tcp(server, client, b"\x17\x03\x03\0\x05 data", seq=2 + 10 * each, ack=end) for each in range(20)]
        packets += [
            tcp(client, server, b"\x17\x03\x03\0\x04more", seq=end, ack=202),
            tcp(client, server, flags="FA", seq=end + 9),
        ]
        found += packets[3 * (number == 5) :]
        found += asked("a.good.test", "192.0.2.7")
    return apart(found)


@pytest.mark.parametrize("elements", ['["dpi", "allow"]', '["ports"]', '["limit", "dpi", "allow", "log"]'])
def test_packets_that_no_element_is_shown_are_judged_as_if_each_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, elements: str
) -> None:
    config = tmp_path / "agent.toml"
    more = """
[element.ports]
type = "policy"
default = "drop"
rule = [{ action = "accept", dport = 443 }]
[element.limit]
type = "rate-limit"
rate = "1/s"
burst = 50
per = "all"
"""
    config.write_text(CONFIG.format(midstream="judge", verify="").replace('["dpi", "allow"]', elements) + more)
    old = tmp_path / "old.toml"
    old.write_text(config.read_text().replace("*.good.test", "*.test"))
    write(tmp_path / "seen.pcap", mixed())
    told = []
    for every in ("", "1"):
        monkeypatch.setenv("NFQ_AGENT_EVERY_PACKET", every)
        code = replay.replay(Flags(config), tmp_path / "seen.pcap", old, False, True)
        told.append((code, json.loads(capsys.readouterr().out)))
    assert told[0] == told[1]
    assert told[0][1]["verdicts"]["accept"] > 0
    assert told[0][1]["verdicts"]["drop"] > 0


def test_few_packets_of_a_flow_reach_the_elements(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_about = []
    decide = Dpi.decide

    def noted(self: Dpi, packet: Packet, flow: Flow | None) -> Verdict | None:
        asked_about.append(packet)
        return decide(self, packet, flow)

    monkeypatch.setattr(Dpi, "decide", noted)
    answers = (tcp(SERVER, CLIENT, b"\x17data", seq=2 + 5 * each, ack=2 + len(HELLO)) for each in range(1000))
    many = [*connection(CLIENT, SERVER, HELLO), *answers]
    assert flows(tmp_path, capsys, apart(many)) == [("accept", False)]
    assert len(asked_about) < 10


def test_a_name_that_was_read_without_the_elements_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "agent.toml"
    config.write_text(CONFIG.format(midstream="accept", verify=""))
    clients = [f"10.0.0.{number}:40001" for number in range(1, 40)]
    write(tmp_path / "seen.pcap", apart([packet for client in clients for packet in connection(client, SERVER, HELLO)]))
    replay.replay(Flags(config), tmp_path / "seen.pcap", None, False, True)
    assert {flow["name"] for flow in json.loads(capsys.readouterr().out)["flows"]} == {"a.good.test"}


@pytest.mark.parametrize(
    ("word", "mode", "code", "changed"),
    [
        ("would-drop", "monitor", 0, []),
        ("would-drop", "enforce", 4, [("would drop", "drop")]),
        ("accept", "monitor", 4, [("accept", "would drop")]),
        ("drop", "enforce", 0, []),
        ("drop", "monitor", 0, [("drop", "would drop")]),
    ],
)
def test_what_an_agent_in_monitor_mode_would_have_dropped_is_no_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str, mode: str, code: int, changed: list[tuple[str, str]]
) -> None:
    text = CONFIG.format(midstream="accept", verify="").replace("[queue.main]", f'[queue.main]\nmode = "{mode}"')
    (config := tmp_path / "agent.toml").write_text(text)
    seen = [
        (BEGIN + at, packet, 0, f"OUTPUT {word}") for at, packet in enumerate(connection(CLIENT, SERVER, client_hello("a.test")))
    ]
    write_ng(tmp_path / "seen.pcapng", ["nfqueue"], seen)
    assert replay.replay(Flags(config), tmp_path / "seen.pcapng", None, False, True) == code
    found = json.loads(capsys.readouterr().out)["changed"]
    assert [(flow["before"], flow["after"]) for flow in found] == changed


def test_a_capture_without_packets_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (config := tmp_path / "agent.toml").write_text(CONFIG.format(midstream="accept", verify=""))
    for capture in (tmp_path / "none.pcap", tmp_path / "none.pcapng"):
        write_ng(capture, ["eth0"], []) if capture.suffix == ".pcapng" else write(capture, [])
        assert replay.replay(Flags(config), capture, None, False, False) == 1
        assert capsys.readouterr().err == f"nfq-agent: {capture}: it has no packets; nothing was judged\n"


def test_conditions_that_no_capture_tells_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    owned = 'unit = "shop.service"\n[[element.allow.rule]]\naction = "accept"\nunit = "x.service"\nuid = 0'
    config = tmp_path / "owned.toml"
    config.write_text(CONFIG.format(midstream="judge", verify=owned))
    write(capture := tmp_path / "x.pcap", apart(connection(CLIENT, SERVER, HELLO)))
    replay.replay(Flags(config), capture, None, False, as_json=False)
    named = "unit of allow (2 rules), uid of allow (rule 3)"
    assert f"hold for no packet, since a capture does not say it: {named}\n" in capsys.readouterr().out
    config.write_text(CONFIG.format(midstream="judge", verify=""))
    replay.replay(Flags(config), capture, None, False, as_json=False)
    assert "hold for no packet" not in capsys.readouterr().out


def test_counts_of_one_are_in_the_singular(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (config := tmp_path / "agent.toml").write_text(CONFIG.format(midstream="accept", verify=""))
    write(tmp_path / "seen.pcap", apart([tcp(CLIENT, SERVER, flags="S")]))
    assert replay.replay(Flags(config), tmp_path / "seen.pcap", config, False, False) == 0
    assert capsys.readouterr().out.splitlines() == [
        "1 packet, 1 flow; 0 flows are taken by no rule and pass",
        "accept: 1 flow",
        f"compared with the verdicts by {config}: 1 flow, 0 changed",
    ]


@pytest.mark.parametrize(("every", "ports"), [(False, ""), (True, ""), (False, "tcp_ports = [443]")])
def test_a_rule_for_the_first_packets_takes_no_other(tmp_path: Path, every: bool, ports: str) -> None:
    (config := tmp_path / "agent.toml").write_text(
        '[queue.main]\ndefault = "drop"\n[rules.syn]\nqueue = "main"\nhooks = ["output", "input"]\ntcp_syn = true\n' + ports
    )
    judging = Judging(load(config), False, every)
    fates = []
    for packet in [*connection(CLIENT, SERVER, b"a", b"b"), tcp(CLIENT, SERVER, flags="S", seq=1)]:
        recorded = Recorded(BEGIN, packet.payload, packet.length, "")
        key = key_of(recorded)
        fate = judging.again(recorded, key)
        fates.append(judging.judge(recorded, None, key).outcome if fate is None else fate)
    assert fates == [Fate.DROPPED, Fate.PASSED, Fate.PASSED, Fate.PASSED, Fate.DROPPED]


def test_a_capture_from_a_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (config := tmp_path / "agent.toml").write_text(CONFIG.format(midstream="accept", verify=""))
    write(tmp_path / "seen.pcap", apart(connection(CLIENT, SERVER, HELLO)))
    told = []
    for name in ("seen.pcap", "-", "fifo"):
        with piped((tmp_path / "seen.pcap").read_bytes(), monkeypatch) as feed:
            capture = {"fifo": Path(f"/dev/fd/{feed}"), "-": Path("-")}.get(name, tmp_path / name)
            assert replay.replay(Flags(config), capture, None, False, True) == 0
            told.append(json.loads(capsys.readouterr().out))
    assert told[0]["packets"] == 3
    assert told[1:] == told[:1] * 2


def test_progress_of_a_pipe_is_told_without_a_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (config := tmp_path / "agent.toml").write_text(CONFIG.format(midstream="accept", verify=""))
    write(tmp_path / "seen.pcap", apart([tcp(CLIENT, SERVER, flags="S")] * 300))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(replay, "_PROGRESS", 0.0)
    with piped((tmp_path / "seen.pcap").read_bytes(), monkeypatch):
        assert replay.replay(Flags(config), Path("-"), None, False, True) == 0
    assert capsys.readouterr().err == "\r256 packets\r\x1b[K"


@pytest.mark.parametrize(("source", "destination"), [("10.0.0.1", "192.0.2.7"), ("2001:db8::1", "2001:db8::2")])
def test_every_protocol_is_judged_or_said_to_be_unreadable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, destination: str
) -> None:
    (config := tmp_path / "agent.toml").write_text(CONFIG.format(midstream="accept", verify=""))
    whole = icmp(source, destination).payload
    place = 9 if len(ip_address(source).packed) == 4 else 6
    seen = [Packet(whole[:place] + bytes([number]) + whole[place + 1 :] + bytes(40)) for number in range(256)]
    write(tmp_path / "seen.pcap", apart(seen))
    assert replay.replay(Flags(config), tmp_path / "seen.pcap", None, False, True) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["packets"] == 256
    assert sum(told["verdicts"].values()) + told["unreadable"] == 256
    assert told["unreadable"] < 12


def test_a_capture_of_which_nothing_can_be_judged_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (config := tmp_path / "agent.toml").write_text(CONFIG.format(midstream="accept", verify=""))
    write(tmp_path / "seen.pcap", [(BEGIN, Packet(b"\x10not IP")), (BEGIN, Packet(b"\x45"))])
    assert replay.replay(Flags(config), tmp_path / "seen.pcap", None, False, False) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "none of its 2 packets could be read as IP; nothing was judged" in said.err


@pytest.mark.parametrize("shown_after", range(4))
def test_a_connection_that_elements_take_over_at_any_moment_is_judged_by_its_name(tmp_path: Path, shown_after: int) -> None:
    # As when `top` begins to watch between the handshake and the first message.
    config = tmp_path / "agent.toml"
    config.write_text(CONFIG.format(midstream="accept", verify=""))
    judging = Judging(load(config), False, every=False)
    hello = client_hello("b.evil.test")
    fates = []
    for number, packet in enumerate([*connection(CLIENT, SERVER, hello), tcp(CLIENT, SERVER, b"x", seq=2 + len(hello), ack=2)]):
        recorded = Recorded(BEGIN + number / 1000, packet.payload, packet.length, "")
        key = key_of(recorded)
        fate = judging.again(recorded, key)
        fates.append(judging.judge(recorded, None, key).outcome if fate is None else fate)
        if number == shown_after:
            list(judging.shown_late())
    assert fates == [Fate.PASSED, Fate.PASSED, Fate.DROPPED, Fate.DROPPED]


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("name", ["a.good.test", "b.evil.test"])
def test_a_hello_in_parts_between_which_the_server_speaks_is_judged_by_its_name(tmp_path: Path, every: bool, name: str) -> None:
    # The first part passes without an element; they take the connection over with the server's packet.
    (config := tmp_path / "agent.toml").write_text(CONFIG.format(midstream="accept", verify=""))
    judging = Judging(load(config), False, every)
    hello = client_hello(name)
    packets = [
        *connection(CLIENT, SERVER, hello[:50]),
        tcp(SERVER, CLIENT, b"unasked", seq=2, ack=52),
        tcp(CLIENT, SERVER, hello[50:], seq=52, ack=9),
    ]
    fates = []
    for number, packet in enumerate(packets):
        recorded = Recorded(BEGIN + number / 1000, packet.payload, packet.length, "")
        key = key_of(recorded)
        fate = judging.again(recorded, key)
        fates.append(judging.judge(recorded, None, key).outcome if fate is None else fate)
    assert fates == [Fate.PASSED] * 4 + [Fate.PASSED if name == "a.good.test" else Fate.DROPPED]
