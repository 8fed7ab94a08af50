"""explain, elements, new-element and bugreport, as a person runs them: the real command, without root."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import pytest_in, verb

from nfq_agent.cli import catalogue
from nfq_agent.cli.bugreport import anonymous, bugreport
from nfq_agent.cli.explain import Question, explain
from nfq_agent.cli.flags import Flags
from nfq_agent.elements import PACKET_ELEMENTS, STREAM_ELEMENTS

CONFIG = """
[queue.egress]
num = 110
mode = "monitor"
elements = ["dpi", "allow"]
[element.allow]
type = "policy"
default = "drop"
rule = [
  { name = "stripe", action = "accept", tls_sni = ["*.stripe.com"] },
  { action = "accept", dst = ["10.0.0.0/8", "fd00::/8"], dport = 443 },
]
[rules.egress]
queue = "egress"
hooks = ["output"]
tcp_ports = [443]
role = "client"
[rules.own]
queue = "egress"
hooks = ["output"]
udp_ports = ["5000:5010"]
owner = 7
interface = "eth0"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "x.toml"
    file.write_text(CONFIG)
    return file


def told(config: Path, capsys: pytest.CaptureFixture[str], *question: str, **more: object) -> list[str]:
    asked = Question(question[0], "[2001:db8::1]:40000" if "[" in question[1] else "192.0.2.1:40000", *question[1:], **more)  # type: ignore[arg-type]  # as the test writes it
    assert explain(Flags(config), asked) == 0
    return capsys.readouterr().out.splitlines()


def test_a_name_that_no_rule_allows(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(config, capsys, "tcp", "192.0.2.9:443", "evil.example.com") == [
        "tcp 192.0.2.1:40000 -> 192.0.2.9:443, hook output, name evil.example.com",
        "Rule:     [rules.egress], table mangle -> queue egress, number 110",
        "Chain:    dpi, allow",
        "At first: accept (allow: undecided)",
        "By name:  would drop; monitor mode accepts it (allow: default)",
        "Nearest:  allow: rule 1 (stripe): tls_sni is evil.example.com, wants *.stripe.com",
        "Nearest:  allow: rule 2: dst is not 10.0.0.0/8, fd00::/8",
    ]


def test_a_name_that_a_rule_allows_and_a_network(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "By name:  accept (allow: rule 1 (stripe))" in told(config, capsys, "tcp", "192.0.2.9:443", "api.stripe.com")
    lines = told(config, capsys, "tcp", "[fd00::1]:443")
    assert "At first: accept (allow: undecided)" in lines or "At first: accept (allow: rule 2)" in lines


def test_on_another_port_a_name_is_what_the_rules_ask_for(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(CONFIG.replace("tls_sni", "http_host").replace("tcp_ports = [443]", "tcp_ports = [8080]"))
    lines = told(config, capsys, "tcp", "192.0.2.9:8080", "api.stripe.com")
    assert "By name:  accept (allow: rule 1 (stripe))" in lines


@pytest.mark.parametrize(
    ("backend", "where"), [("owned", [""]), ("auto", [", where the backend is owned"]), ("legacy", [])], ids=str
)
def test_a_rule_that_the_kernel_applies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: str, where: list[str]
) -> None:
    text = CONFIG.replace('"dpi", "allow"', '"allow"').replace('mode = "monitor"', 'compile = "auto"')
    text = text.replace('  { name = "stripe", action = "accept", tls_sni = ["*.stripe.com"] },\n', "")
    (file := tmp_path / "x.toml").write_text(f'[agent]\nbackend = "{backend}"\n{text}')
    lines = told(file, capsys, "tcp", "10.1.2.3:443")
    assert lines[3] == "At first: accept (allow: rule 1)"
    expected = [f"          a rule of the kernel decides it, in front of the queue{each}" for each in where]
    assert [line for line in lines if "of the kernel" in line] == expected


def test_a_packet_that_no_rule_takes(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(config, capsys, "udp", "192.0.2.9:5005", uid=8) == [
        "udp 192.0.2.1:40000 -> 192.0.2.9:5005, hook output",
        "Rule:     none takes it: it passes without the agent",
        "Nearest:  [rules.egress]: protocol is udp, wants tcp",
        "Nearest:  [rules.own]: uid is 8, wants 7; interface is not given, wants eth0",
    ]
    assert "number 110" in told(config, capsys, "udp", "192.0.2.9:5005", uid=7, interface="eth0")[1]


def test_the_command_explains_without_root(config: Path) -> None:
    done = verb("explain", "tcp", "10.0.0.5:443", "--name", "evil.example.com", "-c", str(config))
    assert (done.returncode, done.stderr) == (0, "")
    assert "By name:  accept (allow: rule 2)" in done.stdout


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("tcp 10.0.0.5", "'10.0.0.5' is not an address with a port; allowed: one as 192.0.2.1:443 or [2001:db8::1]:443"),
        ("tcp host.test:443", "'host.test:443' is not an address with a port"),
        ("udp ::1:53", "'::1:53' is not an address with a port"),
        ("icmp 10.0.0.5:0", "'10.0.0.5:0' is not an address; allowed: one as 192.0.2.1 or 2001:db8::1"),
        ("tcp 10.0.0.5:443 --from [::1]:5", "[::1]:5 and 10.0.0.5:443 are of different families"),
        ("sctp 10.0.0.5:1", "'sctp' is not a known protocol; allowed: tcp, udp, icmp"),
        ("tcp 10.0.0.5:443 --uid root", "Invalid value for '--uid': not a whole number; see `nfq-agent explain --help`"),
    ],
)
def test_a_question_that_cannot_be_read_is_wrong_usage(given: str, said: str) -> None:
    done = verb("explain", *given.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


def test_elements_are_listed_and_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert catalogue.elements(None) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split(" ", 1)[0] for line in lines} >= {*PACKET_ELEMENTS, *STREAM_ELEMENTS}
    for name in (*PACKET_ELEMENTS, *STREAM_ELEMENTS):
        assert catalogue.elements(name) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80, lines
        assert "annotated" not in " ".join(lines).lower()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("slicr", "unknown element 'slicr' (did you mean 'slicer'?); allowed: what `nfq-agent elements` lists"),
        ("", "unknown element ''; allowed: what"),
        ("none.such:Element", "none.such:Element cannot be imported: No module named 'none'"),
        ("json:JSONDecoder", "is not a"),
    ],
)
def test_an_element_that_cannot_be_shown(capsys: pytest.CaptureFixture[str], name: str, said: str) -> None:
    assert catalogue.elements(name) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Class", "'Class' is not a valid name"),
        ("a-", "'a-' is not a valid name"),
        ("a" * 32, "up to 31 small letters"),
        ("log", "'log' is taken: a built-in element has it; allowed: another name, as in my-log"),
        ("import", "'import' is taken: it is a word of Python's language"),
        ("queue", "'queue' is taken: a module that the agent needs has it"),
        ("nfq-agent", "'nfq-agent' is taken: a module that the agent needs has it"),
    ],
)
def test_a_new_element_takes_no_name_that_cannot_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    assert catalogue.new_element(name, tmp_path) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_new_element_passes_its_test_and_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert catalogue.new_element("scan-guard", tmp_path) == 0
    tested = pytest_in(tmp_path / "elements")
    assert tested.returncode == 0, tested.stdout
    checked = verb("check", "--config", str(tmp_path / "scan_guard.toml"))
    assert checked.returncode == 0, checked.stderr
    assert catalogue.new_element("scan-guard", tmp_path) == 1
    assert "nothing was written" in capsys.readouterr().err
    assert catalogue.new_element("Bad Name", tmp_path) == 2


def test_a_bug_report_is_one_file_for_its_owner(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "report.txt"
    assert bugreport(Flags(config), output, True) == 0
    assert output.stat().st_mode & 0o777 == 0o600
    text = output.read_text()
    assert "10.0.0.0" not in text
    assert "stripe.com" not in text
    assert 'elements = ["dpi", "allow"]' in text
    assert "valid; instance default" in text
    assert bugreport(Flags(config), output, False) == 1, "a file that exists is left alone"
    capsys.readouterr()


def test_addresses_and_names_are_replaced_by_the_same_words() -> None:
    text = "10.1.2.3 fd00::1 10.1.2.3 127.0.0.1 api.example.org nfq-agent.toml 00:11:22:33:44:55 alice@box at 12:30:05 v1.2.3"
    assert anonymous(text, ["box", "alice"]) == (
        "ipv4-1 ipv6-1 ipv4-1 127.0.0.1 name-1 nfq-agent.toml mac-1 host-1@host-2 at 12:30:05 v1.2.3"
    )


def test_the_program_that_has_the_socket(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(CONFIG.replace('tls_sni = ["*.stripe.com"]', 'exe = "/usr/bin/pay*"'))
    assert "At first: accept (allow: rule 1 (stripe))" in told(config, capsys, "tcp", "192.0.2.9:443", exe="/usr/bin/payd")
    for exe, said in (("/usr/bin/curl", "/usr/bin/curl"), ("", "not given")):
        lines = told(config, capsys, "tcp", "192.0.2.9:443", exe=exe)
        assert f"Nearest:  allow: rule 1 (stripe): exe is {said}, wants /usr/bin/pay*" in lines
