"""How elements are found by name, and the messages for wrong ones."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from forked import pytest_in, verb
from tutorial import DOCS

from nfq_agent.config.file import load
from nfq_agent.config.models import ConfigError
from nfq_agent.elements import PACKET_ELEMENTS, STREAM_ELEMENTS, ElementError, packet_element, stream_element


def test_every_built_in_can_be_had_and_is_documented() -> None:
    text = DOCS.read_text()
    for name in PACKET_ELEMENTS:
        assert packet_element(name).__doc__
        assert f"\n### {name}\n" in text, f"{name} has no paragraph in docs/elements.md"
    for name in STREAM_ELEMENTS:
        assert stream_element(name).__doc__


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("syn-monitr", "did you mean 'syn-monitor'?"),
        ("no.such:Thing", "cannot be imported"),
        ("os:NoSuchClass", "cannot be imported"),
        ("os:getpid", "is not a packet element; allowed: a subclass of nfq_agent.PacketElement"),
    ],
)
def test_what_is_no_element(kind: str, message: str) -> None:
    with pytest.raises(ElementError, match=re.escape(message)):
        packet_element(kind)


def test_an_entry_point_of_an_installed_package(tmp_path: Path) -> None:
    (tmp_path / "others.py").write_text("from nfq_agent import PacketElement\nclass Other(PacketElement): pass\n")
    info = tmp_path / "others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[nfq_agent.elements]\nother = others:Other\n")
    code = "from nfq_agent.elements import packet_element; print(packet_element('other').__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "Other\n"


def test_the_tutorial_s_test_passes(tutorial: Path) -> None:
    done = pytest_in(tutorial / "elements", "test_scan_guard.py")
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout


def test_the_tutorial_s_configuration_is_checked(tutorial: Path) -> None:
    path = tutorial / "nfq-agent.toml"
    assert verb("check", "--config", str(path)).returncode == 0
    good = path.read_text()
    for wrong, key in (('ports = "five"', "ports"), ("prots = 5", "prots")):
        path.write_text(good.replace("ports = 5", wrong))
        done = verb("check", "--config", str(path))
        assert done.returncode == 78
        assert f"element.guard.{key}" in done.stderr


def test_code_that_anyone_may_change_is_refused(tutorial: Path) -> None:
    (tutorial / "elements").chmod(0o777)
    with pytest.raises(ConfigError, match="others may put code into this folder; allowed: chown root"):
        load(tutorial / "nfq-agent.toml")


@pytest.mark.parametrize(
    ("queue", "table", "expected"),
    [
        (
            "",
            'rule = [{ action = "drop", dprot = 1 }]',
            "element.e.rule[1].dprot: unknown key (did you mean 'dport'?) (line 6); allowed: ",
        ),
        ("", "defalt = 1", "element.e.defalt: unknown key (did you mean 'default'?) (line 6); allowed: type, default, undecided"),
        (
            "",
            'rule = [{ action = "drop", src = ["10.0.0.1/8"] }]',
            "element.e.rule[1].src: '10.0.0.1/8' has bits set after its prefix (did you mean '10.0.0.0/8'?) (line 6); ",
        ),
        ('copy = "meta"', "", 'queue.q.copy: "meta" beside \'e\', which reads what is in a packet (line 3); allowed: "packet"'),
    ],
)
def test_faults_are_said_in_plain_words(tmp_path: Path, queue: str, table: str, expected: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(
        f'[queue.q]\nelements = ["e"]\n{queue}\n[element.e]\ntype = "policy"\n{table}\n[rules.r]\nqueue = "q"\ntcp_ports = [1]\n'
    )
    with pytest.raises(ConfigError) as caught:
        load(path)
    (fault,) = caught.value.faults
    assert fault.startswith(f"{path}: {expected}")
