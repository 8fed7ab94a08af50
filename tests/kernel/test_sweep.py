"""`sweep` and `remove` beside an agent that was started by hand, so that no unit tells of it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from agent import Agent
from namespace import PATIENCE, Namespace

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
# A packet whose answer, that no process listens, is back: nothing is under way that would still count.
ASK = """
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
    asking.settimeout(30)
    asking.connect(("127.0.0.1", 9))
    asking.send(b"x")
    try:
        asking.recv(1)
    except ConnectionRefusedError:
        print("refused")
"""
# With the counters, which begin again where rules are put in again.
RULES = "iptables-legacy-save -c -t mangle | grep NFQA || true; nft list ruleset"


@pytest.mark.parametrize("backend", ["legacy", "owned"])
@pytest.mark.parametrize("stopped", [False, True], ids=["serving", "hanging"])
def test_a_living_agent_keeps_its_rules_and_a_dead_one_does_not(
    netns: Namespace, tmp_path: Path, backend: str, stopped: bool
) -> None:
    agent = Agent(netns, tmp_path, CONFIG.format(backend=backend)).ready()
    assert netns.run(sys.executable, "-c", ASK).stdout == "refused\n"
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


LOOK = """
import sys
from select import select
from nfq_agent.service.instance_lock import living_agent
looked, missed = 0, 0
# Each question stays in the backlog of the agent, which has room for 4,096.
while not select([0], [], [], 0.002)[0]:
    looked += 1
    missed += not living_agent("default")
    if looked == 1:
        print("looks", flush=True)
print(looked, missed)
"""


def test_an_agent_that_is_started_again_in_place_is_there_at_each_moment(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, CONFIG.format(backend="legacy")).ready()
    looking = netns.start(sys.executable, "-c", LOOK, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert looking.stdout is not None
    assert looking.stdout.readline() == "looks\n"
    for _ in range(2):
        assert agent.verb("restart").returncode == 0
        assert "restarted" in agent.verb("restart").stdout
    looked, missed = map(int, looking.communicate("x", timeout=PATIENCE)[0].split())
    assert looked > 100
    assert missed == 0
    # What told of it meanwhile is gone.
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
