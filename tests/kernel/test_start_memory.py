"""What an agent without elements never loads: what checks its configuration, a third of its memory."""

from __future__ import annotations

from pathlib import Path

from agent import Agent, until
from namespace import Namespace

_CONFIG = '[queue.main]\nnum = 100\n[rules.app]\nqueue = "main"\ntcp_ports = [{port}]\n'
# What checks it, what the library of digests brings, and what `shutil` does.
_LIBRARIES = ("_pydantic_core", "libcrypto", "liblzma", "libbz2")


def holds(pid: int) -> bool:
    """Whether a process has loaded one of them."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    return any(each in maps for each in _LIBRARIES)


def test_no_process_that_serves_without_elements_holds_what_checks_the_configuration(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, _CONFIG.format(port=80)).ready()
    (worker,) = agent.workers()
    assert not any(map(holds, (agent.process.pid, worker)))
    # What writes rules is loaded once the worker's process has begun.
    assert "libxtables" not in Path(f"/proc/{worker}/maps").read_text()
    # A reload has the new file checked, and refused, elsewhere too.
    agent.configure(_CONFIG.format(port=81))
    agent.verb("reload")
    agent.configure(_CONFIG.format(port=70000))
    refused = agent.verb("reload", check=False)
    assert refused.returncode == 78
    assert "rules.app.tcp_ports: 70000 is not a valid port (line 5)" in " ".join(refused.stderr.split())
    (worker,) = agent.workers()
    assert not any(map(holds, (agent.process.pid, worker)))
    # The program that starts again in place finds it out for itself.
    agent.configure(_CONFIG.format(port=82))
    agent.verb("restart")
    (worker,) = agent.workers()
    assert not any(map(holds, (agent.process.pid, worker)))
    # With an element both have it, and from then on.
    agent.configure(_CONFIG.format(port=82).replace("num", 'elements = ["log"]\nnum', 1))
    agent.verb("reload")
    until(lambda: all(map(holds, (agent.process.pid, *agent.workers()))), "the element is loaded")
    assert agent.stop() == 0
    assert "Traceback" not in agent.log
