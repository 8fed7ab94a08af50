"""Elements whose code is wrong, or changes, under a running agent."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from agent import Agent, ours, until
from namespace import PATIENCE, Namespace
from traffic import PYTHON

pytestmark = pytest.mark.kernel

ELEMENT = """
from nfq_agent import ACCEPT, DROP, PacketElement
class Own(PacketElement):
    def decide(self, packet, flow):
        return {verdict}
"""
CONFIG = """
[queue.main]
num = 100
elements = ["own:Own"]
[rules.app]
queue = "main"
hooks = ["output"]
udp_ports = [11000]
"""
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes the element beside the configuration."""
    folder = tmp_path / "elements"
    folder.mkdir(mode=0o755)

    def put(text: str) -> Path:
        file = folder / "own.py"
        file.write_text(text)
        file.chmod(0o644)
        return file

    return put


WRONG = {
    "syntax": ("class Own:\n    pass:\n", 2, "SyntaxError"),
    "name": ("import os\nclass Own(PacketElement):\n    pass\n", 2, "NameError: name 'PacketElement' is not defined"),
    "exit": ("raise SystemExit(0)\n", 1, "SystemExit: 0"),
    "interrupt": ("raise KeyboardInterrupt\n", 1, "KeyboardInterrupt"),
    "attribute": ("class Other:\n    pass\n", 0, "has no attribute 'Own'"),
    "options": (
        "from nfq_agent import Options, PacketElement\nfrom pydantic import field_validator\n"
        "class Own(PacketElement):\n    class Options(Options):\n        n: int = 1\n"
        "        @field_validator('n')\n        def _n(cls, value):\n            return undefined\n"
        "        model_config = {'validate_default': True}\n",
        8,
        "NameError: name 'undefined' is not defined",
    ),
    "needs": (
        "from nfq_agent import PacketElement\nclass Own(PacketElement):\n    @classmethod\n"
        "    def needs_of(cls, options):\n        return undefined\n",
        5,
        "NameError: name 'undefined' is not defined",
    ),
    "base": ("class Stop(BaseException):\n    pass\nraise Stop('no')\n", 3, "Stop: no"),
    "access": ("from nfq_agent import PacketElement\nclass Own(PacketElement):\n    access = 5\n", 0, "access is 5"),
    "denies": (
        "from nfq_agent import PacketElement\nclass Own(PacketElement):\n    @classmethod\n"
        "    def denies_of(cls, options):\n        raise KeyError('no')\n",
        5,
        "KeyError: 'no'",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_an_element_that_cannot_be_loaded_is_refused_with_its_line(
    netns: Namespace, tmp_path: Path, write: Write, kind: str
) -> None:
    text, line, what = WRONG[kind]
    file = write(text)
    agent = Agent(netns, tmp_path, CONFIG)
    assert agent.process.wait(timeout=PATIENCE) == 78
    checked = agent.verb("check", check=False)
    assert checked.returncode == 78
    for said in (agent.log, checked.stderr):
        assert what in said
        assert "Traceback" not in said
        if line:
            assert f"{file}:{line}: " in said
    assert ours(netns) == []


@pytest.mark.parametrize("kind", ["syntax", "exit", "needs", "base", "access"])
def test_a_running_agent_outlives_an_element_that_is_broken(netns: Namespace, tmp_path: Path, write: Write, kind: str) -> None:
    write(ELEMENT.format(verdict="ACCEPT"))
    agent = Agent(netns, tmp_path, CONFIG).ready()
    mine, (worker,) = ours(netns), agent.workers()
    text, _, what = WRONG[kind]
    write(text)
    agent.process.send_signal(signal.SIGHUP)
    until(lambda: "reload refused" in agent.log, "the reload is refused")
    refused = agent.verb("reload", check=False)
    assert refused.returncode == 78
    assert what in refused.stderr
    # Every verb that does not need the element works.
    assert agent.verb("status", "--json").returncode == 0
    assert "NFQUEUE" in agent.verb("rules").stdout
    examined = agent.verb("doctor", check=False)
    # Its lines fit the terminal.
    assert what in " ".join(examined.stdout.split())
    assert "Traceback" not in examined.stdout + examined.stderr
    assert (ours(netns), agent.workers()) == (mine, [worker])
    # A worker that dies is started again from the code that is in force.
    os.kill(worker, signal.SIGKILL)
    until(lambda: agent.workers() not in ([worker], [None]), "another worker serves")
    # What ExecStopPost runs after a crash.
    for pid in [agent.process.pid, *agent.workers()]:
        os.kill(pid, signal.SIGKILL)
    agent.process.wait(timeout=PATIENCE)
    assert ours(netns)
    agent.verb("remove", "--after-failure")
    assert ours(netns) == []
    assert "nothing to remove" in agent.verb("remove").stdout


def test_a_reload_takes_code_that_changed(netns: Namespace, tmp_path: Path, write: Write) -> None:
    write(ELEMENT.format(verdict="ACCEPT"))
    agent = Agent(netns, tmp_path, CONFIG).ready()

    def send() -> None:
        netns.run(PYTHON, "-c", "import socket; socket.socket(2, 2).sendto(b'x', ('127.0.0.1', 11000))", check=False)

    (first,) = agent.workers()
    send()
    until(lambda: agent.totals()["accepted"] == 1, "the packet is accepted")
    same = agent.verb("reload")
    assert "0 replaced" in same.stdout
    assert agent.workers() == [first]
    file = write(ELEMENT.format(verdict="DROP"))
    told = agent.verb("reload")
    assert "1 replaced" in told.stdout
    assert f"new code: {file}" in told.stdout
    (second,) = agent.workers()
    assert second != first
    send()
    until(lambda: agent.totals()["dropped"] == 1, "the packet is dropped by the new code")
    assert agent.stop() == 0
