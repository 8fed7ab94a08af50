"""`learn`: that its proposal is a valid drop-in, accepts what the capture shows and nothing else, and says why."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from openings import client_hello, dns_query
from recorded import BEGIN, capture, connection, piped, write_ng
from typer.testing import CliRunner

from nfq_agent.cli import learn, replay
from nfq_agent.cli.flags import Flags
from nfq_agent.cli.verbs import app
from nfq_agent.config.file import load
from nfq_agent.packet import Packet
from nfq_agent.testing import tcp, udp

CONFIG = """
[queue.egress]
num = 7
elements = ["log"]
[rules.out]
queue = "egress"
hooks = ["output"]
all = true
"""


def get(host: str) -> bytes:
    return f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()


SEEN = [
    *connection("10.0.0.1:40001", "192.0.2.1:443", client_hello("pay.example.org")),
    *connection("10.0.0.2:40002", "192.0.2.1:443", client_hello("pay.example.org")),
    *connection("10.0.0.1:40003", "192.0.2.2:80", get("one.example.org"), get("two.example.org")),
    *connection("10.0.0.1:40004", "192.0.2.3:5000", b"\x00\x01something of its own\xff"),
    udp("10.0.0.1:40005", "192.0.2.53:53", dns_query("pay.example.org")),
    udp("10.0.0.1:40006", "192.0.2.53:53", dns_query("one.example.org")),
]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "agent.toml"
    path.write_text(CONFIG)
    return path


def test_a_proposal_accepts_what_was_seen_and_nothing_else(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = capture(tmp_path / "seen.pcap", SEEN)
    (tmp_path / "conf.d").mkdir()
    drop_in = tmp_path / "conf.d" / "learned.toml"
    assert learn.learn(Flags(config), seen, drop_in) == 0
    assert capsys.readouterr().err == "5 rules; they accept 6 of 6 flows of the capture\n"
    proposed = tomllib.loads(drop_in.read_text())
    assert proposed["queue"]["egress"] == {"mode": "monitor", "elements": ["dpi", "learned-egress", "log"]}
    rules = proposed["element"]["learned-egress"]["rule"]
    assert {tuple(sorted((key, value) for key, value in rule.items() if key != "action")) for rule in rules} == {
        (("dport", 443), ("tls_sni", "pay.example.org")),
        (("dport", 80), ("http_host", "one.example.org")),
        (("dport", 80), ("http_host", "two.example.org")),
        (("dport", 5000), ("dst", "192.0.2.3"), ("protocol", "tcp")),
        (("dport", 53), ("dst", "192.0.2.53"), ("protocol", "dns")),
    }
    assert "# 2 flows, " in drop_in.read_text()
    assert ", from 10.0.0.1, 10.0.0.2\n" in drop_in.read_text()
    # In force, it lets pass what was seen, and drops another name.
    other = [*connection("10.0.0.1:40007", "192.0.2.1:443", client_hello("evil.example.org"))]
    both = capture(tmp_path / "both.pcap", [*SEEN, *other])
    before = tmp_path / "before.toml"
    before.write_text(CONFIG)
    drop_in.rename(tmp_path / "conf.d" / "kept")
    (tmp_path / "new").mkdir()
    after = tmp_path / "new" / "agent.toml"
    after.write_text(CONFIG)
    (tmp_path / "new" / "conf.d").mkdir()
    (tmp_path / "conf.d" / "kept").rename(tmp_path / "new" / "conf.d" / "learned.toml")
    assert replay.replay(Flags(after), both, before, True, False) == replay.DROPS_MORE
    told = capsys.readouterr().out
    assert "accept: 6 flows" in told
    assert "accept -> drop: tcp 10.0.0.1:40007 -> 192.0.2.1:443 evil.example.org" in told


def test_a_name_with_signs_of_patterns_matches_itself_alone(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = capture(tmp_path / "seen.pcap", connection("10.0.0.1:1", "192.0.2.1:443", client_hello("*.example.org")))
    assert learn.learn(Flags(config), seen, None) == 0
    said = capsys.readouterr()
    # What is not a host name is not a name: the address is proposed, and no pattern that would match others.
    assert 'dst = "192.0.2.1"' in said.out or 'tls_sni = "[*].example.org"' in said.out


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        ('["log"]', ["dpi", "NEW", "log"]),
        ('["dpi", "log"]', ["dpi", "NEW", "log"]),
        ("[]", ["dpi", "NEW"]),
        # What decides before a policy still does.
        ('["slow", "dpi", "old", "log"]', ["slow", "dpi", "NEW", "log"]),
        ('["slow", "log"]', ["slow", "dpi", "NEW", "log"]),
        ('["names", "old", "slow"]', ["names", "NEW", "slow"]),
        ('["old", "names", "old2", "log"]', ["names", "NEW", "log"]),
    ],
)
def test_the_chain_keeps_its_order_around_the_learned_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], elements: str, expected: list[str]
) -> None:
    (path := tmp_path / "agent.toml").write_text(
        CONFIG.replace('["log"]', elements)
        + '[element.slow]\ntype = "rate-limit"\nrate = "1000/s"\nper = "all"\n[element.names]\ntype = "dpi"\n'
        + '[element.old]\ntype = "policy"\n[element.old2]\ntype = "policy"\n'
    )
    assert learn.learn(Flags(path), capture(tmp_path / "seen.pcap", SEEN), None) == 0
    proposed = tomllib.loads(capsys.readouterr().out)["queue"]["egress"]["elements"]
    assert proposed == [each.replace("NEW", "learned-egress") for each in expected]


def test_the_longest_name_of_a_queue(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path := tmp_path / "agent.toml").write_text(CONFIG.replace("egress", "e" * 32))
    (tmp_path / "conf.d").mkdir()
    drop_in = tmp_path / "conf.d" / "learned.toml"
    assert learn.learn(Flags(path), capture(tmp_path / "seen.pcap", SEEN), drop_in) == 0
    assert "they accept 6 of 6 flows" in capsys.readouterr().err
    load(path)


def test_answers_are_accepted_where_no_flow_has_a_name(tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    late = [tcp("192.0.2.1:443", "10.0.0.1:40001", b"\x17\x03\x03\0\1x", seq=9 + 6 * each, ack=7) for each in range(9)]
    seen = [*connection("10.0.0.2:40002", "192.0.2.1:5000", b"\x00\x01something\xff"), *late]
    (tmp_path / "conf.d").mkdir()
    assert learn.learn(Flags(config), capture(tmp_path / "seen.pcap", seen), tmp_path / "conf.d" / "learned.toml") == 0
    assert capsys.readouterr().err == "2 rules; they accept 2 of 2 flows of the capture\n"
    rules = tomllib.loads((tmp_path / "conf.d" / "learned.toml").read_text())["element"]["learned-egress"]["rule"]
    # The second is of the server, although the capture begins with what it sends.
    assert [(rule["dst"], rule["dport"], rule.get("facts")) for rule in rules] == [
        ("192.0.2.1", 5000, {"dpi": "*"}), ("192.0.2.1", 443, None),
    ]  # fmt: skip
    assert replay.replay(Flags(config), tmp_path / "seen.pcap", None, True, False) == 0
    assert "accept: 2 flows" in capsys.readouterr().out


def test_a_capture_that_is_cut_and_one_from_a_pipe(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = capture(tmp_path / "seen.pcap", SEEN).read_bytes()
    (tmp_path / "cut.pcap").write_bytes(whole[:-3])
    assert learn.learn(Flags(config), tmp_path / "cut.pcap", tmp_path / "out.toml") == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0].endswith(f"ends within a record, at byte {len(whole) - 3}; what came before it is learned")
    assert said[1] == "5 rules; they accept 5 of 5 flows of the capture"
    with piped(whole, monkeypatch):
        assert learn.learn(Flags(config), Path("-"), tmp_path / "out.toml") == 0
    assert capsys.readouterr().err == "5 rules; they accept 6 of 6 flows of the capture\n"


def test_a_capture_that_no_rule_takes_proposes_nothing(tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert learn.learn(Flags(config), capture(tmp_path / "empty.pcap", []), None) == 1
    assert "nothing is proposed" in capsys.readouterr().err
    assert learn.learn(Flags(config), tmp_path / "none", None) == 1
    assert "No such file" in capsys.readouterr().err


def test_what_the_agent_dropped_is_not_proposed(tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def seen(client: str, name: str, last: str) -> list[tuple[float, Packet, int, str]]:
        packets = list(connection(client, "192.0.2.1:443", client_hello(name)))
        words = ["OUTPUT accept"] * (len(packets) - 1) + [f"OUTPUT {last}"]
        return [(BEGIN + at, packet, 0, word) for at, (packet, word) in enumerate(zip(packets, words, strict=True))]

    passed = seen("10.0.0.1:40001", "a.test", "accept") + seen("10.0.0.1:40002", "b.test", "would-drop")
    dropped = seen("10.0.0.1:40003", "evil.test", "drop") + seen("10.0.0.1:40004", "evil.test", "reject")
    capture = write_ng(tmp_path / "seen.pcapng", ["nfqueue"], passed + dropped)
    assert learn.learn(Flags(config), capture, tmp_path / "out.toml") == 0
    assert capsys.readouterr().err.splitlines() == [
        "2 flows were dropped by the agent and are not proposed",
        "2 rules; they accept 2 of 2 flows of the capture",
    ]
    rules = tomllib.loads((tmp_path / "out.toml").read_text())["element"]["learned-egress"]["rule"]
    assert [rule["tls_sni"] for rule in rules] == ["a.test", "b.test"]
    write_ng(capture, ["nfqueue"], dropped[:3])
    assert learn.learn(Flags(config), capture, None) == 1
    assert capsys.readouterr().err.splitlines() == [
        "1 flow was dropped by the agent and is not proposed",
        f"nfq-agent: {capture}: every flow of it was dropped; nothing is proposed",
    ]


def test_rules_for_an_interface_take_what_was_captured_there(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(CONFIG.replace("all = true", 'all = true\ninterface = "wan*"'))
    seen = [(BEGIN + at, packet, at // 3, "") for at, packet in enumerate(SEEN[:6])]
    assert learn.learn(Flags(config), write_ng(tmp_path / "seen.pcapng", ["wan0", "lan0"], seen), None) == 0
    assert capsys.readouterr().err == "1 rule; it accepts 1 of 1 flows of the capture\n"


def test_the_shipped_example_tells_the_whole_way() -> None:
    example = (Path(__file__).parents[1] / "configs" / "egress-by-service.toml").read_text()
    told = [line.removeprefix("#   ") for line in example.splitlines() if line.startswith("#   ")]
    assert [line.split()[0] for line in told] == ["watch", "learn", "replay", "enforce", "watch"]
    # In small letters: the name of the unit is the same.
    verbs = re.findall(r"nfq-agent ([a-z]+)([^;\n]*)", "\n".join(told))
    assert [verb for verb, _ in verbs] == ["learn", "replay", "plan", "reload", "top"]
    for verb, options in verbs:
        help_text = CliRunner().invoke(app, [verb, "--help"], terminal_width=200).output
        assert all(option in help_text for option in re.findall(r"--[a-z-]+", options)), verb
