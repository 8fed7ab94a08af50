"""`sweep` and `remove` beside an agent that was started by hand, so that no unit tells of it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from agent import Agent
from namespace import Namespace

pytestmark = pytest.mark.kernel

CONFIG = """
[agent]
backend = "{backend}"
[queue.main]
num = 7
[rules.main]
queue = "main"
udp_ports = [9]
"""
# With the counters, which begin again where rules are put in again.
RULES = "iptables-legacy-save -c -t mangle | grep NFQA || true; nft list ruleset"


@pytest.mark.parametrize("backend", ["legacy", "owned"])
@pytest.mark.parametrize("stopped", [False, True], ids=["serving", "hanging"])
def test_a_living_agent_keeps_its_rules_and_a_dead_one_does_not(
    netns: Namespace, tmp_path: Path, backend: str, stopped: bool
) -> None:
    agent = Agent(netns, tmp_path, CONFIG.format(backend=backend)).ready()
    netns.run("bash", "-c", "echo x > /dev/udp/127.0.0.1/9")
    before = netns.shell(RULES)
    assert "NFQA-default-OUTPUT" in before
    if stopped:
        agent.process.send_signal(signal.SIGSTOP)
    said = agent.verb("sweep").stdout
    who = f"the agent of instance default is running (pid {agent.process.pid})"
    assert " ".join(said.split()) == f"{who} and keeps its rules: nothing to sweep; stop it, and it removes them"
    assert netns.shell(RULES) == before
    agent.process.send_signal(signal.SIGCONT)
    agent.kill()
    assert agent.verb("sweep").returncode == 0
    assert "NFQA" not in netns.shell(RULES)


@pytest.mark.parametrize("verb", ["sweep", "remove", "apply"])
def test_an_agent_with_another_run_folder_keeps_its_rules_too(netns: Namespace, tmp_path: Path, verb: str) -> None:
    """As one in a container with --net=host."""
    agent = Agent(netns, tmp_path, CONFIG.format(backend="legacy"), RUNTIME_DIRECTORY="/run/elsewhere").ready()
    before = netns.shell(RULES)
    done = agent.verb(verb, check=False)
    assert done.returncode == (0 if verb == "sweep" else 1)
    assert f"(pid {agent.process.pid})" in done.stdout + done.stderr
    assert netns.shell(RULES) == before
    assert agent.stop() == 0
