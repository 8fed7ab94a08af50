"""`check`, `status` and `doctor`: what they print and how they end. No agent, or one that answers what the test says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from answering import Answering

from nfq_agent.cli import doctor, inspect
from nfq_agent.cli.finding import Finding
from nfq_agent.cli.flags import Flags
from nfq_agent.config.models import ConfigError
from nfq_agent.service.status import StatusError

Said = pytest.CaptureFixture[str]
CLOSED = """
[queue.web]
num = 1
bypass = false
elements = ["capture"]
[element.capture]
type = "pcap"
directory = "/var/lib/captures"
[rules.web]
queue = "web"
tcp_ports = [80]
"""


def flags(folder: Path, text: str) -> Flags:
    path = folder / "nfq-agent.toml"
    path.write_text(text)
    return Flags(config=path)


def test_a_valid_file_with_its_policy_exemptions_and_warnings(tmp_path: Path, capsys: Said) -> None:
    given = flags(tmp_path, CLOSED)
    assert inspect.check(given, code=False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{given.config}: valid"
    assert lines[1].startswith("queue web: mode enforce")
    assert any(line.startswith("exemption: queue web: capture") and "/var/lib/captures" in line for line in lines)
    assert any(line.startswith("warning: rules.web: bypass = false drops this traffic") for line in lines)


def test_check_as_before_a_restart_says_the_same(tmp_path: Path, capsys: Said) -> None:
    given = flags(tmp_path, CLOSED)
    inspect.check(given, code=False)
    before = capsys.readouterr().out
    assert inspect.check(given, code=True) == 0
    assert capsys.readouterr().out == before


def test_a_bad_file_is_not_called_valid(tmp_path: Path, capsys: Said) -> None:
    with pytest.raises(ConfigError, match=r"rules\.web\.tcp_ports"):
        inspect.check(flags(tmp_path, CLOSED.replace("[80]", "[80000]")), code=False)
    assert capsys.readouterr().out == ""


def test_status_without_an_agent(run_folder: Path, capsys: Said) -> None:
    assert run_folder.is_dir()
    assert inspect.status(Flags(instance="default"), as_json=False) == 1
    assert "no agent of instance default is running; `nfq-agent rules` shows whether rules were left" in capsys.readouterr().out
    assert inspect.status(Flags(instance="default"), as_json=True) == 1
    assert json.loads(capsys.readouterr().out) == {"instance": "default", "running": False}


def test_the_status_of_an_agent_is_printed_as_it_answers(agent: Answering, capsys: Said) -> None:
    agent.reply = {"running": True, "instance": "default", "version": "1"}
    assert inspect.status(Flags(instance="default"), as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == agent.reply
    assert agent.asked == [{"verb": "status"}]


def test_the_status_of_another_version_is_not_guessed(agent: Answering) -> None:
    agent.reply = {"running": True, "instance": "default", "version": "0"}
    with pytest.raises(StatusError, match=r"of another version.*restart it"):
        inspect.status(Flags(instance="default"), as_json=False)


@pytest.mark.parametrize(("level", "code"), [("good", 0), ("warning", 0), ("error", 1)])
def test_doctor_fails_for_an_error_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said, level: str, code: int
) -> None:
    found = Finding(level, "kernel", "it is as it is", "do that")  # type: ignore[arg-type]  # one of the levels
    monkeypatch.setattr(doctor, "examine", lambda _: iter([found]))
    given = flags(tmp_path, CLOSED)
    assert inspect.doctor(given, as_json=False) == code
    text = capsys.readouterr().out
    assert "kernel: it is as it is" in text
    assert "-> do that" in text
    assert inspect.doctor(given, as_json=True) == code
    assert json.loads(capsys.readouterr().out) == {"findings": [found.as_object()]}


def test_doctor_names_the_faults_of_a_file_and_examines_the_host_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda _: iter([Finding("good", "kernel", "fine")]))
    assert inspect.doctor(flags(tmp_path, CLOSED.replace("[80]", "[80000]")), as_json=True) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert [each["level"] for each in findings] == ["good", "error"]
    assert "rules.web.tcp_ports" in findings[1]["text"]
