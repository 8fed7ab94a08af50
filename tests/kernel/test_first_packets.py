"""Of the flows that the kernel decides, a record where one is asked for: the agent with `compile = "first"`."""

from __future__ import annotations

import contextlib
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from agent import Agent, until
from namespace import Namespace

from nfq_agent.rules.kernel_policy import NOT_RECORDED

pytestmark = pytest.mark.kernel

SENT = 500
TEXT = """
[agent]
backend = "owned"
[queue.main]
compile = "first"
elements = ["allow", "record"]
[element.allow]
type = "policy"
default = "accept"
rule = [{ action = "drop", protocol = ["udp"], dport = [9] }]
[element.record]
events = "begin"
[rules.app]
queue = "main"
hooks = ["output"]
udp_ports = [9]
"""


def send() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for _ in range(SENT):
            # What a rule drops, the kernel says to the sender.
            with contextlib.suppress(PermissionError):
                sender.sendto(b"x", ("127.0.0.1", 9))


def decided(agent: Agent) -> dict[str, int]:
    return {each["rule"]: each["in_kernel"] for each in agent.queue()["decisions"]}


def records(agent: Agent) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in agent.log.splitlines() if line.startswith("{"))
    return [line for line in lines if line.get("event") == "begin"]


def test_a_flow_that_the_kernel_denies_has_a_record_and_what_goes_beyond_is_counted(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, TEXT, LOG_FORMAT="json").ready()
    netns.call(send)
    (record,) = until(lambda: records(agent), "the flow has a record")
    assert record["verdict"] == "drop"
    assert record["reason"] == "allow: rule 1"
    until(lambda: agent.totals()["dropped"] + decided(agent)["rule 1"] == SENT, "each packet was decided")
    assert 100 <= agent.totals()["dropped"] < SENT
    assert decided(agent)[NOT_RECORDED] == decided(agent)["rule 1"]
    assert agent.stop() == 0
