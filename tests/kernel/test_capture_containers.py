"""Interfaces are named by the containers behind them: processes in control groups of the real hierarchy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agent import Agent, until
from containers import bridged
from namespace import Namespace

CONFIG = """
[{kind}.pods]
interfaces = ["veth*"]
tcp_ports = [8080]
elements = ["verdicts", "log"]
[element.verdicts]
type = "policy"
default = "accept"
rule = [ {{ action = "drop", container = "web-{tag}", direction = "in" }} ]
[element.log]
each = "flow"
"""


def interfaces(agent: Agent, kind: str) -> dict[str, str | None]:
    (table,) = agent.status()[f"{kind}s"]
    return {each["name"]: each["container"] for each in table["interfaces"]}


def judged(agent: Agent, kind: str) -> dict[str, Any]:
    counters: dict[str, Any] = agent.status()[f"{kind}s"][0]["counters"]
    return counters


def test_a_policy_and_the_log_know_the_container(netns: Namespace, tmp_path: Path, groups: tuple[Path, str]) -> None:
    root, tag = groups
    first, second = bridged(netns)
    second.serve()
    group = root / f"machine-web\\x2d{tag}.scope" / "cgroup.procs"
    group.write_text(str(first.pid))
    try:
        agent = Agent(netns, tmp_path, CONFIG.format(kind="inline", tag=tag)).ready()
        until(lambda: interfaces(agent, "inline") == {"veth1": f"web-{tag}", "veth2": None}, "one container is known")
        # The worker is told a moment after the status.
        until(lambda: first.get("10.5.0.2", seconds=1.5) == "000", "it is denied")
        until(lambda: f"drop, 60 bytes, container web-{tag}" in agent.log, "the log names it")
        assert f"veth1 (container web-{tag})" in agent.verb("status").stdout
        # A worker that comes later is told, too.
        agent.configure(CONFIG.format(kind="tap", tag=tag))
        agent.verb("reload")
        until(lambda: interfaces(agent, "tap") == {"veth1": f"web-{tag}", "veth2": None}, "the tap knows it")
        until(lambda: first.get("10.5.0.2") == "200" and judged(agent, "tap")["would_drop"] > 0, "it would have been dropped")
        assert agent.stop() == 0
    finally:
        (root / "cgroup.procs").write_text(str(first.pid))


def test_a_container_whose_process_comes_after_its_interface(netns: Namespace, tmp_path: Path, groups: tuple[Path, str]) -> None:
    root, tag = groups
    agent = Agent(netns, tmp_path, CONFIG.format(kind="tap", tag=tag)).ready()
    first, _ = bridged(netns)
    until(lambda: interfaces(agent, "tap") == {"veth1": None, "veth2": None}, "none is known")
    (root / f"machine-web\\x2d{tag}.scope" / "cgroup.procs").write_text(str(first.pid))
    try:
        until(lambda: interfaces(agent, "tap")["veth1"] == f"web-{tag}", "it is found")
        assert agent.stop() == 0
    finally:
        (root / "cgroup.procs").write_text(str(first.pid))
