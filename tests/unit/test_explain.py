"""explain, elements, new-element and bugreport, as a person runs them: the real command, without root."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest
from forked import pytest_in, verb

from nfq_agent.cli import catalogue
from nfq_agent.cli.bugreport import anonymous, bugreport
from nfq_agent.cli.explain import explain
from nfq_agent.cli.flags import Flags
from nfq_agent.cli.question import Question
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
    assert "No name:  would drop; monitor mode accepts it (allow: default)" in told(config, capsys, "tcp", "192.0.2.9:443")


def test_a_name_that_a_rule_allows_and_a_network(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "By name:  accept (allow: rule 1 (stripe))" in told(config, capsys, "tcp", "192.0.2.9:443", "api.stripe.com")
    lines = told(config, capsys, "tcp", "[fd00::1]:443")
    assert "At first: accept (allow: undecided)" in lines or "At first: accept (allow: rule 2)" in lines


def test_on_another_port_a_name_is_what_the_rules_ask_for(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(CONFIG.replace("tls_sni", "http_host").replace("tcp_ports = [443]", "tcp_ports = [8080]"))
    lines = told(config, capsys, "tcp", "192.0.2.9:8080", "api.stripe.com")
    assert "By name:  accept (allow: rule 1 (stripe))" in lines
    # Over TCP an SNI is that of TLS, also on a port of its own.
    config.write_text(
        CONFIG.replace("tls_sni =", 'protocol = "tls", tls_sni =').replace("tcp_ports = [443]", "tcp_ports = [8443]")
    )
    lines = told(config, capsys, "tcp", "192.0.2.9:8443", "api.stripe.com")
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


SEVERAL = """
[queue.web]
num = 7
elements = ["dpi", "allow"]
[queue.rest]
num = 8
default = "drop"
[rules.web]
queue = "web"
tcp_ports = [443]
hooks = ["input", "output", "forward"]
[rules.rest]
queue = "rest"
all = true
hooks = ["output", "input"]
[rules.syn]
queue = "web"
table = "raw"
tcp_syn = true
hooks = ["prerouting"]
[inline.pods]
interfaces = ["veth*"]
tcp_ports = [22]
role = "server"
elements = ["dpi", "names"]
[tap.wan]
interfaces = ["wan0"]
elements = ["dpi", "names"]
[element.names]
type = "policy"
default = "drop"
rule = [{ action = "accept", tls_sni = "*.good.test" }]
[element.allow]
type = "policy"
default = "drop"
rule = [
  { action = "accept", tls_sni = "*.good.test" },
  { action = "accept", interface = "eth0", dport = 443, unit = "shop.service" },
  { action = "accept", uid = 5, dport = 443 },
  { action = "accept", gid = 6, cgroup = "/system.slice/*" },
]
"""


@pytest.mark.parametrize(
    ("protocol", "destination", "more", "expected"),
    [
        # The first rule of a table takes the packet, and no other one of that table is asked.
        ("tcp", "192.0.2.9:443", {}, [
            "Rule:     [rules.web], table mangle -> queue web, number 7",
            "          [rules.rest] matches too, and is not asked: [rules.web] comes before it in table mangle",
        ]),
        ("tcp", "192.0.2.9:443", {"interface": "eth0", "unit": "shop.service"}, ["At first: accept (allow: rule 2)"]),
        ("tcp", "192.0.2.9:443", {"uid": 5}, ["At first: accept (allow: rule 3)"]),
        ("tcp", "192.0.2.9:443", {"gid": 6, "cgroup": "system.slice/x.service"}, ["At first: accept (allow: rule 4)"]),
        # Who sent it is known of packets that this host sends alone.
        ("tcp", "192.0.2.9:443", {"uid": 5, "hook": "input"}, [
            "          uid is not known of a packet in hook input", "At first: accept (allow: undecided)",
        ]),
        ("tcp", "192.0.2.9:443", {"interface": "eth0", "unit": "shop.service", "hook": "forward"}, [
            "          unit is not known of a packet in hook forward", "At first: accept (allow: undecided)",
            "Nearest:  allow: rule 2: unit is not given, wants shop.service",
        ]),
        ("tcp", "192.0.2.9:443", {"name": "a.good.test", "hook": "prerouting"}, [
            "Rule:     [rules.syn], table raw -> queue web, number 7",
            "          the rule takes the first packet of a connection alone (tcp_syn): its name is never seen",
        ]),
        ("tcp", "192.0.2.9:22", {"hook": "forward", "interface": "veth1", "to_interface": "wan0"}, [
            "Tap:      [tap.wan], interface wan0", "No name:  would drop; a tap only watches (names: default)",
        ]),
        ("tcp", "192.0.2.9:22", {"hook": "forward", "interface": "wan1", "to_interface": "veth1"}, [
            "Inline:   [inline.pods], interface veth1", "No name:  drop (names: default)",
        ]),
        ("tcp", "192.0.2.9:22", {"hook": "forward", "interface": "veth1"}, [
            "Rule:     none takes it: it passes without the agent",
            "Nearest:  [tap.wan]: interface is veth1, wants wan0",
            "Nearest:  [inline.pods]: port is tcp 40000, wants tcp 22",
        ]),
    ],
)  # fmt: skip
def test_what_takes_a_packet_and_by_which_of_its_properties(  # a line of the table
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    protocol: str,
    destination: str,
    more: dict[str, object],
    expected: list[str],
) -> None:
    (file := tmp_path / "x.toml").write_text(SEVERAL)
    lines = told(file, capsys, protocol, destination, **more)
    assert [line for line in lines if line in expected] == expected


def test_packets_of_the_agent_s_own_user_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    me = pwd.getpwuid(os.geteuid())
    (file := tmp_path / "x.toml").write_text(f'[agent]\nuser = "{me.pw_name}"\n{SEVERAL}')
    lines = told(file, capsys, "tcp", "192.0.2.9:443", uid=me.pw_uid)
    assert lines[1:] == [f"Rule:     none takes it: packets of the agent's own user, {me.pw_name}, always pass"]


def test_protocols_without_ports(tmp_path: Path) -> None:
    (file := tmp_path / "x.toml").write_text(
        '[queue.q]\ndefault = "drop"\n[rules.r]\nqueue = "q"\nhooks = ["output"]\n'
        'protocol = ["gre", "icmpv6", "ah", "udplite", 250]\n'
    )
    for words, first in [
        (["gre", "192.0.2.9"], "gre 192.0.2.1 -> 192.0.2.9, hook output"),
        (["icmp", "2001:db8::9"], "icmpv6 2001:db8::1 -> 2001:db8::9, hook output"),
        (["ah", "192.0.2.9"], "ah 192.0.2.1 -> 192.0.2.9, hook output"),
        (["udplite", "[2001:db8::9]:7"], "udplite [2001:db8::1]:40000 -> [2001:db8::9]:7, hook output"),
        (["250", "192.0.2.9"], "proto-250 192.0.2.1 -> 192.0.2.9, hook output"),
    ]:
        done = verb("explain", *words, "-c", str(file))
        assert (done.returncode, done.stdout.splitlines()[0]) == (0, first), done.stderr
        assert "At first: drop (default of the queue)" in done.stdout


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
        ("tls 10.0.0.5:1", "'tls' is not a known protocol; allowed: icmp, igmp, "),
        ("sctp 10.0.0.5", "'10.0.0.5' is not an address with a port; allowed: one as 192.0.2.1:443 or [2001:db8::1]:443"),
        ("gre 10.0.0.5:1", "'10.0.0.5:1' is not an address; allowed: one as 192.0.2.1 or 2001:db8::1"),
        ("ah 2001:db8::5", "ah is an extension header in IPv6, and no rule looks at it; allowed: the protocol behind it"),
        ("icmpv6 10.0.0.5", "icmpv6 is between addresses of IPv6; allowed: icmp"),
        ("tcp 10.0.0.5:443 --mark -1", "'-1' is not a mark; allowed: 32 bits, as in \"0x10\""),
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
        ("queue", "'queue' is taken: a module that the agent or its tests need has it"),
        ("nfq-agent", "'nfq-agent' is taken: a module that the agent or its tests need has it"),
        ("pydantic", "'pydantic' is taken: a module that the agent or its tests need has it"),
        ("conftest", "'conftest' is taken: a module that the agent or its tests need has it"),
        # What the written files import, or cannot define.
        ("packet", "'packet' is taken: the class Packet would be another one; allowed: another name, as in my-packet"),
        ("bench", "'bench' is taken: the class Bench would be another one"),
        ("none", "'none' is taken: the class None would be another one"),
    ],
)
def test_a_new_element_takes_no_name_that_cannot_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    assert catalogue.new_element(name, tmp_path) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["scan-guard", "a1"])
def test_a_new_element_passes_the_checks_of_its_writer(tmp_path: Path, name: str) -> None:
    """Those of ruff without a configuration, from either folder, and mypy --strict."""
    assert catalogue.new_element(name, tmp_path) == 0
    tools = Path(sys.executable).parent
    for folder in (tmp_path, tmp_path / "elements"):
        for words in (
            ("check", "--isolated", "--no-cache", "--extend-select=I"),
            ("format", "--isolated", "--no-cache", "--check"),
        ):
            checked = subprocess.run([tools / "ruff", *words, "."], cwd=folder, capture_output=True, text=True, check=False)
            assert checked.returncode == 0, checked.stdout
    typed = subprocess.run(
        [tools / "mypy", "--strict", f"--cache-dir={tmp_path}", "."],
        cwd=tmp_path / "elements",
        capture_output=True,
        text=True,
        check=False,
    )
    assert typed.returncode == 0, typed.stdout


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
    assert anonymous(text, {"box": "host", "alice": "user"}) == (
        "ipv4-1 ipv6-1 ipv4-1 127.0.0.1 name-1 nfq-agent.toml mac-1 user-1@host-1 at 12:30:05 v1.2.3"
    )


def test_the_program_that_has_the_socket(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(CONFIG.replace('tls_sni = ["*.stripe.com"]', 'exe = "/usr/bin/pay*"'))
    assert "At first: accept (allow: rule 1 (stripe))" in told(config, capsys, "tcp", "192.0.2.9:443", exe="/usr/bin/payd")
    for exe, said in (("/usr/bin/curl", "/usr/bin/curl"), ("", "not given")):
        lines = told(config, capsys, "tcp", "192.0.2.9:443", exe=exe)
        assert f"Nearest:  allow: rule 1 (stripe): exe is {said}, wants /usr/bin/pay*" in lines
