"""What the tests of the agent share: a configuration that takes UDP, floods, and a count of what passes."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable

from agent import Agent, saved
from namespace import Namespace
from traffic import FLOOD, PYTHON

UDP = """
[queue.main]
num = 100
max_len = {max_len}
fail_open = {fail_open}
bypass = {bypass}
[rules.app]
queue = "main"
hooks = ["output"]
udp_ports = [11000]
"""


def udp(max_len: int = 4096, fail_open: bool = True, bypass: bool = True, more: str = "") -> str:
    """A configuration that takes UDP to port 11000 on its way out."""
    return UDP.format(max_len=max_len, fail_open=str(fail_open).lower(), bypass=str(bypass).lower()) + more


def flood(namespace: Namespace, count: int, rate: int = 100_000, address: str = "127.0.0.1") -> subprocess.Popen[bytes]:
    """Start a flood."""
    return namespace.start(PYTHON, "-c", FLOOD, address, "11000", str(count), str(rate), stdout=subprocess.PIPE)


def count_passed(namespace: Namespace) -> Callable[[], int]:
    """A rule behind ours (filter OUTPUT comes after mangle OUTPUT) that counts what passes; the function reads it."""
    namespace.run("iptables-legacy", "-w", "-A", "OUTPUT", "-p", "udp", "--dport", "11000")

    def passed() -> int:
        (line,) = [
            each for each in saved(namespace, counters=True).splitlines() if "-A OUTPUT -p udp -m udp --dport 11000" in each
        ]
        return int(re.match(r"\[(\d+):", line)[1])  # type: ignore[index]  # every line of -c begins with its counters

    return passed


def another_than(agent: Agent, worker: int) -> bool:
    return agent.workers() not in ([worker], [None])
