"""`learn --for` beside a running agent in monitor mode, and what its proposal does when it is enforced."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path
from subprocess import DEVNULL

from agent import COMMAND, Agent, until
from namespace import Namespace
from screens import terminal

CONFIG = """
[queue.main]
num = 7
mode = "monitor"
elements = ["dpi", "egress"]
[element.egress]
type = "policy"
default = "drop"
[rules.out]
queue = "main"
hooks = ["output"]
tcp_ports = [8080]
"""


def serve(netns: Namespace) -> None:
    netns.start(sys.executable, "-m", "http.server", "8080", "--bind", "127.0.0.1", stdout=DEVNULL, stderr=DEVNULL)
    until(lambda: ":8080" in netns.run("ss", "-Hltn").stdout, "the server listens")


def ask(netns: Namespace, name: str, seconds: int = 60) -> bool:
    argv = ("curl", "-s", "-m", str(seconds), "-o", "/dev/null", "-H", f"Host: {name}", "http://127.0.0.1:8080/")
    return netns.run(*argv, check=False).returncode == 0


def test_a_watch_ended_by_ctrl_c_proposes_what_was_seen(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, CONFIG).ready()
    serve(netns)
    output = tmp_path / "proposal.toml"
    argv = [*COMMAND, "learn", "--for", "24h", "--config", str(agent.config), "-o", str(output)]
    with terminal(netns, tmp_path / "learn", argv, 80, 24) as screen:
        until(lambda: "of 24h: 0 flows" in screen.text, "the progress")
        for name in ("a.test", "a.test", "b.test"):
            assert ask(netns, name)
        until(lambda: "of 24h: 3 flows" in screen.text, "the flows in the progress")
        # An agent that starts again in place is asked on.
        assert agent.verb("restart").returncode == 0
        assert ask(netns, "c.test")
        until(lambda: "of 24h: 4 flows" in screen.text, "the flow after the restart")
        screen.press("C-c")
        until(lambda: "exit 0" in screen.text, "the end")
        assert "3 rules; they accept 4 of 4 flows that were seen" in screen.text
    proposed = tomllib.loads(output.read_text())
    rules = proposed["element"]["learned-main"]["rule"]
    assert [rule["http_host"] for rule in rules] == ["a.test", "b.test", "c.test"]
    assert "# 2 flows, " in output.read_text()
    # Enforced, it lets pass what was seen and drops another name.
    drop_in = tmp_path / "conf.d" / "learned.toml"
    drop_in.parent.mkdir()
    drop_in.write_text(output.read_text().replace('mode = "monitor"', 'mode = "enforce"'))
    assert agent.verb("reload").returncode == 0
    assert [ask(netns, name) for name in ("a.test", "b.test", "c.test")] == [True] * 3
    assert not ask(netns, "evil.test", 2)
    queue = json.loads(agent.verb("status", "--json").stdout)["queues"][0]
    assert {each["rule"]: each["count"] for each in queue["decisions"] if each["element"] == "learned-main"}["default"] >= 1
    assert agent.stop() == 0


def test_the_end_of_the_time_and_what_cannot_be_learned(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, CONFIG.replace('mode = "monitor"', "").replace('"dpi", ', "")).ready()
    serve(netns)
    netns.start("sh", "-c", "for each in $(seq 60); do curl -s -m 0.5 http://127.0.0.1:8080/; done", stdout=DEVNULL)
    done = agent.verb("learn", "--for", "4s", check=False)
    assert done.returncode == 1
    assert "queue main is not in monitor mode: flows that it drops are not proposed" in done.stderr
    assert "queue main has no element dpi: addresses are learned, and no names" in done.stderr
    assert re.search(r"^[1-9]\d* flows were dropped by the agent and are not proposed$", done.stderr, re.MULTILINE)
    assert "nothing is proposed" in done.stderr
    assert agent.stop() == 0
    done = agent.verb("learn", "--for", "3s", check=False)
    assert done.returncode == 1
    assert "no agent" in done.stderr or "not run" in done.stderr
