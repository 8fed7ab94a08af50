"""Rules by control group: of groups that exist, that appear later, that are made again, and that go."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent import Agent, until
from control_groups import joined, leave
from namespace import Namespace
from owned_table import send

from nfq_agent.host.cgroups import mounted
from nfq_agent.service import control

pytestmark = pytest.mark.kernel

PYTHON = sys.executable
BACKENDS = pytest.mark.parametrize("backend", ["legacy", "owned"])
TEXT = """
[agent]
backend = "{backend}"
drift_check = "{check}"
[queue.main]
[rules.app]
queue = "main"
hooks = ["output"]
udp_ports = [9]
"""
SEND = f"import sys; sys.path[:0] = {sys.path!r}\nfrom owned_table import send\nsend(9, 3)"


@pytest.fixture
def group() -> Iterator[Path]:
    """The path of a control group that does not exist yet."""
    root = mounted()
    if root is None:
        pytest.skip("no control groups of version 2 are mounted")
    path = root / f"nfq-test-{os.getpid()}"
    yield path
    if path.exists():
        leave(path)


def send_from(netns: Namespace, group: Path) -> None:
    """Three datagrams to port 9 from a process in the group."""
    netns.run(*joined(group, PYTHON, "-c", SEND))


def followed(agent: Agent) -> int:
    """How often rules for a new group were put in: the agent may have seen that the old one was gone, or not."""
    return agent.log.count("rule app is in for it")


@BACKENDS
def test_a_group_that_appears_and_is_made_again(netns: Namespace, tmp_path: Path, backend: str, group: Path) -> None:
    # Also where the rules are not checked for drift.
    agent = Agent(netns, tmp_path, f'{TEXT.format(backend=backend, check=0)}cgroup = "{group.name}"\n').ready()
    assert f"the control group {group.name} does not exist: its unit does not run, or has another name" in agent.log
    assert agent.status()["drift"]["waiting"] == [f"the control group {group.name} does not exist; rule app waits for it"]
    assert "waits for it" in agent.verb("status").stdout
    netns.call(send, 9, 5)
    assert agent.totals()["received"] == 0

    group.mkdir()
    until(lambda: "exists now: rule app is in for it" in agent.log, "the rule is in")
    send_from(netns, group)
    netns.call(send, 9, 5)
    assert agent.totals()["received"] == 3
    assert agent.status()["drift"]["waiting"] == []

    for count in (6, 9):
        # A unit that is started again has a new group of the same name.
        before = followed(agent)
        leave(group)
        group.mkdir()
        until(lambda before=before: followed(agent) > before, "the new rule is in")  # type: ignore[misc]  # its default is the type
        send_from(netns, group)
        assert agent.totals()["received"] == count
    (late,) = [each for each in agent.status()["bypasses"] if each["cause"] == "cgroup-late"]
    assert (late["name"], late["unit"]) == (group.name, "seconds")
    # A rule that is put in by the agent itself is not drift.
    assert agent.status()["drift"]["repairs"] == 0
    assert "Nothing to do" in agent.verb("plan").stdout
    assert [each["packets"] for each in agent.status()["rules"] if "NFQUEUE" in each["rule"] and each["family"] == "inet"][
        :1
    ] == [3]

    leave(group)
    until(lambda: f"the control group {group.name} is gone; rule app waits for it" in agent.log, "the rule is out")
    assert agent.stop() == 0


@BACKENDS
def test_a_group_that_is_made_again_while_no_agent_runs(netns: Namespace, tmp_path: Path, backend: str, group: Path) -> None:
    """With `bypass = false` the rules of a killed agent stay, and are bound to the group that is gone."""
    text = TEXT.format(backend=backend, check="30s").replace("[queue.main]", "[queue.main]\nbypass = false")
    group.mkdir()
    agent = Agent(netns, tmp_path, f'{text}cgroup = "{group.name}"\n').ready()
    agent.kill()
    leave(group)
    group.mkdir()
    agent = Agent(netns, tmp_path, f'{text}cgroup = "{group.name}"\n').ready()
    send_from(netns, group)
    assert agent.totals()["received"] == 3
    assert agent.stop() == 0


@BACKENDS
def test_an_excluded_group(netns: Namespace, tmp_path: Path, backend: str, group: Path) -> None:
    agent = Agent(netns, tmp_path, f'{TEXT.format(backend=backend, check="30s")}not_cgroup = "{group.name}"\n').ready()
    netns.call(send, 9, 5)
    assert agent.totals()["received"] == 5
    for _ in range(2):
        group.mkdir()
        until(lambda: "the rules that exclude it are in" in agent.log.rpartition("is gone")[2], "the rules follow")
        send_from(netns, group)
        assert agent.totals()["received"] == 5
        leave(group)
        until(lambda: "the rules that exclude it" not in agent.log.rpartition("is gone")[2], "the rules follow")
    assert not [each for each in agent.status()["bypasses"] if each["cause"] == "cgroup-late"]
    assert agent.stop() == 0


def appear(group: str) -> None:
    """Make a group, and ask for the status before the agent can have looked by itself."""
    os.mkdir(group)
    control.ask("default", {"verb": "status"})


@BACKENDS
def test_a_look_at_the_rules_takes_no_new_group_for_drift(netns: Namespace, tmp_path: Path, backend: str, group: Path) -> None:
    """Who asked for the status at once after a group appeared kept its rules out."""
    agent = Agent(netns, tmp_path, f'{TEXT.format(backend=backend, check=0)}not_cgroup = "{group.name}"\n').ready()
    for _ in range(3):
        netns.call(appear, str(group))
        until(lambda: "the rules that exclude it are in" in agent.log.rpartition("is gone")[2], "the rules follow")
        send_from(netns, group)
        leave(group)
        until(lambda: "the rules that exclude it" not in agent.log.rpartition("is gone")[2], "the rules follow")
    assert agent.totals()["received"] == 0
    assert agent.status()["drift"]["wrong"] == []
    assert agent.stop() == 0


@BACKENDS
def test_what_is_sent_by_a_marked_connection(netns: Namespace, tmp_path: Path, backend: str, group: Path) -> None:
    """The connections of a group stay marked: their refusals by ICMP, which the kernel sends, come to the queue as well."""
    group.mkdir()
    text = TEXT.format(backend=backend, check="30s").replace("udp_ports = [9]", "all = true")
    agent = Agent(netns, tmp_path, f'{text}cgroup = "{group.name}"\n').ready()
    send_from(netns, group)
    netns.call(send, 9, 5)
    assert agent.totals()["received"] == 6
    assert agent.stop() == 0


@BACKENDS
def test_apply_waits_for_no_group(netns: Namespace, tmp_path: Path, backend: str) -> None:
    (tmp_path / "a.toml").write_text(f'{TEXT.format(backend=backend, check="30s")}cgroup = "nosuch.service"\n')
    verb = (PYTHON, "-m", "nfq_agent")
    refused = netns.run(*verb, "apply", "--config", str(tmp_path / "a.toml"), check=False)
    assert refused.returncode == 1
    assert refused.stderr.startswith(
        "nfq-agent: the control group system.slice/nosuch.service does not exist: its unit does not run"
    )
    assert "NFQA" not in netns.shell("iptables-legacy-save; nft list ruleset")
    planned = netns.run(*verb, "plan", "--config", str(tmp_path / "a.toml"), check=False)
    assert "the control group system.slice/nosuch.service does not exist" in planned.stdout + planned.stderr
