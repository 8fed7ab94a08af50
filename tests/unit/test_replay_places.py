"""`replay` by what comments of an agent say beside the verdict: interfaces, which a capture may name itself, marks and owners."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final

import pytest
from recorded import BEGIN, write_ng

from nfq_agent.capture.recording import Recorded
from nfq_agent.cli import replay
from nfq_agent.cli.flags import Flags
from nfq_agent.cli.judging import Judging
from nfq_agent.cli.sighting import sighting
from nfq_agent.config.file import load
from nfq_agent.testing import tcp

CLIENT: Final = "10.0.0.1:40001"
SERVER: Final = "192.0.2.7:443"
PLACED = """
[queue.main]
num = 7
elements = ["allow"]
[rules.web]
queue = "main"
hooks = ["output", "forward"]
all = true
{rule}
[element.allow]
type = "policy"
default = "drop"
rule = [ {{ action = "accept", interface = "wan*" }} ]
"""


@pytest.mark.parametrize(
    ("rule", "comment", "fate"),
    [
        ("", "OUTPUT accept out wan0", "accept"),
        ("", "OUTPUT accept out lan0", "drop"),
        ("", "FORWARD accept in wan0 out lan0", "accept"),
        ("", "FORWARD accept in lan0 out wan1", "accept"),
        ("", "FORWARD accept in lan0 out lan1", "drop"),
        # Not taken by the rule.
        ('interface = "lan0"', "FORWARD accept in eth0 out eth1", "accept"),
        ('interface = "lan0"', "FORWARD accept in lan0 out eth1", "drop"),
        ('interface = "lan0"\nrole = "server"', "FORWARD accept in lan0 out eth1", "drop"),
        ('not_interface = "lan0"', "FORWARD accept in eth1 out lan0", "accept"),
    ],
)
def test_the_interfaces_of_a_comment_count_for_rules_and_policies(  # a line of the table
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rule: str, comment: str, fate: str
) -> None:
    (config := tmp_path / "agent.toml").write_text(PLACED.format(rule=rule))
    seen = Recorded(BEGIN, tcp(CLIENT, SERVER, flags="S").payload, 40, comment)
    judged = Judging(load(config), False).judge(seen, sighting(seen))
    assert judged.outcome.word == fate


@pytest.mark.parametrize("hooks", ['["input", "output"]', '["forward"]', '["prerouting"]', '["postrouting"]'])
@pytest.mark.parametrize(
    ("rule", "fates"),
    [
        # By the policy, which accepts at wan*.
        ("", ["accept", "drop", "drop"]),
        ('interface = "lan0"', ["accept", "drop", "accept"]),
        ('not_interface = "lan0"', ["accept", "accept", "drop"]),
    ],
)
def test_the_interfaces_that_a_capture_names_count_for_rules_and_policies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rule: str, fates: list[str], hooks: str
) -> None:
    (config := tmp_path / "agent.toml").write_text(re.sub("hooks = .*", f"hooks = {hooks}", PLACED.format(rule=rule)))
    # The last of them stands for all interfaces: which one a packet crossed is not known.
    seen = [
        (BEGIN + number / 10 + at, tcp(f"10.0.0.1:4000{number}", SERVER, b"x" * int(at), flags="A" if at else "S"), number, "")
        for number in range(3)
        for at in (0.0, 2.0)
    ]
    write_ng(tmp_path / "seen.pcapng", ["wan0", "lan0", "any"], sorted(seen, key=lambda each: each[0]))
    replay.replay(Flags(config), tmp_path / "seen.pcapng", None, False, True)
    assert [flow["after"] for flow in json.loads(capsys.readouterr().out)["flows"]] == fates


def test_one_flow_at_two_interfaces_is_judged_at_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (config := tmp_path / "agent.toml").write_text(PLACED.format(rule='interface = "lan0"'))
    seen = [(BEGIN + number / 10, tcp(CLIENT, SERVER, flags="S"), number % 2, "") for number in range(6)]
    write_ng(tmp_path / "seen.pcapng", ["wan0", "lan0"], seen)
    replay.replay(Flags(config), tmp_path / "seen.pcapng", None, False, True)
    assert json.loads(capsys.readouterr().out)["verdicts"] == {"accept": 3, "would drop": 0, "drop": 3}


@pytest.mark.parametrize(
    ("rule", "interface", "said"),
    [
        ("", "", ""),
        ('interface = "lan0"', "", "rules.web (interface)"),
        ('interface = "lan0"', "wan0", ""),
        ('uid = 5\ncgroup = "system.slice"\nnot_interface = "lo"', "wan0", "rules.web (uid, cgroup)"),
        ("not_uid = 5", "", ""),
    ],
)
def test_rules_that_ask_for_what_a_capture_does_not_say_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rule: str, interface: str, said: str
) -> None:
    text = PLACED.format(rule=rule).replace('hooks = ["output", "forward"]', 'hooks = ["output"]')
    (config := tmp_path / "agent.toml").write_text(text)
    write_ng(tmp_path / "seen.pcapng", [interface], [(BEGIN, tcp(CLIENT, SERVER, flags="S"), 0, "")])
    replay.replay(Flags(config), tmp_path / "seen.pcapng", None, False, False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("took no packet")]
    assert lines == [f"took no packet, since a capture does not say what they ask for: {said}"] * bool(said)
    replay.replay(Flags(config), tmp_path / "seen.pcapng", None, False, True)
    assert json.loads(capsys.readouterr().out)["out_of_reach"] == [said] * bool(said)


OWNED = """
[queue.main]
num = 7
elements = ["dpi", "allow"]
[rules.out]
queue = "main"
hooks = ["output"]
all = true
{rule}
[element.allow]
type = "policy"
default = "drop"
rule = [ {{ action = "accept", {condition} }} ]
"""


@pytest.mark.parametrize(
    ("rule", "condition", "said", "fate"),
    [
        ("", "unit = 'shop.service'", "uid 33 gid 33 unit shop.service cgroup /system.slice/shop.service", "accept"),
        ("", "unit = 'shop.service'", "uid 33 gid 33 unit mail.service", "drop"),
        ("", "unit = 'shop.service'", "uid 33 gid 33", "drop"),
        ("", "container = 'two words'", "container two%20words", "accept"),
        ("", "uid = 33", "uid 33", "accept"),
        ("", "uid = 33", "uid x", "drop"),
        ("", "uid = 33", "uid 4294967296", "drop"),
        # Not taken by the rule.
        ("mark = '0x10/0x30'", "dport = 1", "mark 0x31", "accept"),
        ("mark = '0x10/0x30'", "dport = 1", "mark 0x11", "drop"),
        ("uid = [33]", "dport = 1", "uid 34", "accept"),
        ("uid = [33]", "dport = 1", "uid 33", "drop"),
        ('cgroup = "system.slice"', "dport = 1", "cgroup /system.slice/shop.service", "drop"),
    ],
)
def test_the_owner_and_the_mark_of_a_comment_count(  # a line of the table
    tmp_path: Path, rule: str, condition: str, said: str, fate: str
) -> None:
    (config := tmp_path / "agent.toml").write_text(OWNED.format(rule=rule, condition=condition))
    seen = Recorded(BEGIN, tcp(CLIENT, SERVER, flags="S").payload, 40, f"OUTPUT accept out eth0 {said}")
    assert Judging(load(config), False).judge(seen, sighting(seen)).outcome.word == fate


def test_conditions_that_a_comment_answers_are_not_named_as_untold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (config := tmp_path / "agent.toml").write_text(OWNED.format(rule="uid = [33]", condition="unit = 'x.service', exe = '/x'"))
    packet = tcp(CLIENT, SERVER, flags="S")
    capture = write_ng(tmp_path / "seen.pcapng", ["nfqueue"], [(BEGIN, packet, 0, "OUTPUT accept uid 33 unit shop.service")])
    replay.replay(Flags(config), capture, None, False, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["untold"], told["out_of_reach"]) == (["exe of allow (rule 1)"], [])
