"""The flags of the seed, on the real command: with one dash, from the environment, and for every verb that takes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from agent import COMMAND, Agent, until
from namespace import Namespace

pytestmark = pytest.mark.kernel


def test_the_flags_of_the_seed(netns: Namespace, tmp_path: Path) -> None:
    flags = ("-queue-num", "101", "-copymode", "packet", "-log-5tuple", "-af-family", "inet")
    agent = Agent(netns, tmp_path, "", *flags).ready()
    report = json.loads(netns.run(*COMMAND, "status", "--json").stdout)
    assert [worker["number"] for worker in report["queues"][0]["workers"]] == [101]
    assert {rule["family"] for rule in report["rules"]} == {"inet"}
    assert report["queues"][0]["elements"] == ["log"]
    assert agent.stop() == 0


def test_queue_num_of_the_environment(netns: Namespace, tmp_path: Path) -> None:
    environment = ("env", "QUEUE_NUM=101", *COMMAND)
    plan = netns.run(*environment, "plan", check=False)
    assert plan.returncode == 3
    assert "--queue-num 101" in plan.stdout
    assert "--queue-num 101" in netns.run(*environment, "apply").stdout
    assert "number 101 of [queue.main] is free" in netns.run(*environment, "doctor", check=False).stdout
    assert netns.run(*environment, "check").returncode == 0
    assert netns.run(*environment, "remove").returncode == 0
    bad = netns.run("env", "QUEUE_NUM=many", *COMMAND, "check", check=False)
    assert (bad.returncode, "QUEUE_NUM" in bad.stderr) == (2, True)
    assert Agent(netns, tmp_path, QUEUE_NUM="102").ready().stop() == 0


def test_each_verb_takes_the_queue_number(netns: Namespace, tmp_path: Path) -> None:
    assert "--queue-num 101" in netns.run(*COMMAND, "plan", "--queue-num", "101", check=False).stdout
    assert "--queue-num 101" in netns.run(*COMMAND, "apply", "-queue-num", "101").stdout
    assert "number 101 of [queue.main] is free" in netns.run(*COMMAND, "doctor", "--queue-num", "101", check=False).stdout
    assert netns.run(*COMMAND, "check", "--queue-num", "101").returncode == 0
    assert "--queue-num 101" in netns.run(*COMMAND, "remove", "-queue-num", "101").stdout
    # The command line wins over the environment, and that over the file.
    file = tmp_path / "a.toml"
    file.write_text('[queue.main]\nnum = 100\n[rules.r]\nqueue = "main"\ntcp_ports = [80]\n')
    words = ("env", "QUEUE_NUM=102", *COMMAND, "plan", "--config", str(file))
    assert "--queue-num 102" in netns.run(*words, check=False).stdout
    assert "--queue-num 101" in netns.run(*words, "-queue-num", "101", check=False).stdout
    bad = netns.run(*COMMAND, "remove", "--queue-num", "many", check=False)
    assert (bad.returncode, "queue-num" in bad.stderr) == (2, True)


def test_the_level_debug_logs_each_packet(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, LOG_LEVEL="debug").ready()
    netns.shell("timeout 1 nc -z 127.0.0.1 11000 || true")
    until(lambda: "-> 127.0.0.1:11000" in agent.log, "the packet's line")
    assert agent.stop() == 0
    steps = ("is locked", "workers answer", "rules are in and verified", "removing the rules", "ending the workers")
    assert [step for step in steps if step not in agent.log] == []


def test_remove_works_with_a_broken_configuration(netns: Namespace, tmp_path: Path) -> None:
    file = tmp_path / "blue.toml"
    file.write_text('[agent]\ninstance = "blue"\n[queue.main]\nnum = 70\n[rules.r]\nqueue = "main"\ntcp_ports = [80]\n')
    netns.run(*COMMAND, "apply", "--config", str(file))
    file.write_text(file.read_text() + "nonsense = true\n")
    assert netns.run(*COMMAND, "check", "--config", str(file), check=False).returncode == 78
    assert "nfq-agent:blue" in netns.run("iptables-legacy-save").stdout
    assert netns.run(*COMMAND, "remove", "--config", str(file)).returncode == 0
    assert "nfq-agent:blue" not in netns.run("iptables-legacy-save").stdout
    file.write_text("not toml")
    done = netns.run(*COMMAND, "remove", "--config", str(file), check=False)
    assert done.returncode == 0
    assert "this applies to instance default" in done.stderr
