"""What one agent costs for 1,000 new flows (processor time, lines in the log, series and bytes of a scrape), and what a roll-out
costs. By hand, as root: `python tests/bench/fleet.py`.

Processor time is that of the agent's own processes, so that a busy machine changes it little."""

from __future__ import annotations

import os
import re
import resource
import socket
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))

from agent import Agent  # the path is set above
from namespace import Namespace

_FLOWS: Final = 1000
_ROUNDS: Final = 5
_CONFIG: Final = """
[log]
format = "json"
[queue.main]
num = 7
elements = ["dpi", "names"{more}]
[element.names]
type = "policy"
default = "accept"
rule = [
  {{ action = "drop", name = "evil", http_host = "evil.example.org" }},
  {{ action = "accept", name = "ours", http_host = "*.example.com" }},
]
[element.lines]
type = "log"
each = "flow"
[rules.web]
queue = "main"
tcp_ports = [8080]
"""
_ROLL_OUT: Final = (("check",), ("plan",), ("reload", "--confirm", "60", "--no-wait"), ("doctor",), ("confirm",))
_KINDS: Final = {"policy alone": "", "policy, one line a flow": ', "lines"', "policy, record": ', "record"'}


def connections(count: int) -> None:
    """Connections with a request and an answer each, over the loopback."""
    server = socket.create_server(("127.0.0.1", 8080), backlog=128)

    def serve() -> None:
        for _ in range(count):
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")

    thread = threading.Thread(target=serve)
    thread.start()
    for number in range(count):
        with socket.create_connection(("127.0.0.1", 8080)) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: h%d.example.com\r\n\r\n" % (number % 50))
            while client.recv(65536):
                pass
    thread.join()
    server.close()


def spent(pids: list[int]) -> float:
    """Seconds of processor time of these processes so far."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def spent_with_children(pid: int) -> float:
    """Seconds of processor time of a process and of its children, also of those that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ended = (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return ended + spent([pid, *map(int, children)])


def memory(pids: list[int]) -> float:
    """Megabytes, shared pages divided among those that share them."""
    kept = [re.findall(r"^Pss: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)[0] for pid in pids]
    return sum(map(int, kept)) / 1024


def measure(name: str, more: str) -> None:
    """Print the line of one kind."""
    with Namespace() as namespace, tempfile.TemporaryDirectory() as folder:
        agent = Agent(namespace, Path(folder), _CONFIG.format(more=more), LOG_FORMAT="json").ready()
        main = int(Path(f"/proc/{agent.process.pid}/stat").read_text().split()[0])
        pids = [main, *agent.workers()]
        namespace.call(connections, 100)
        idle = agent.verb("metrics").stdout
        cost, lines = [], []
        for _ in range(_ROUNDS):
            before, size = spent(pids), len(agent.log)
            namespace.call(connections, _FLOWS)
            cost.append(spent(pids) - before)
            lines.append(len(agent.log) - size)
        scrape = agent.verb("metrics").stdout
        series = [sum(not line.startswith("#") for line in text.splitlines()) for text in (idle, scrape)]
        print(
            f"{name}: {statistics.median(cost) * 1000:.0f} ms of CPU for {_FLOWS} connections "
            f"({min(cost) * 1000:.0f} to {max(cost) * 1000:.0f}), {statistics.median(lines) / 1000:.0f} kB of log, "
            f"{series[0]} series before and {series[1]} after, {len(scrape) / 1000:.1f} kB a scrape, {memory(pids):.0f} MB",
            flush=True,
        )
        agent.stop()


def roll_out() -> None:
    """Print what the verbs of a policy's roll-out cost: processor time of the command and of the agent, time until the answer."""
    costs: dict[str, list[tuple[float, float, float]]] = {" ".join(verb): [] for verb in _ROLL_OUT}
    with Namespace() as namespace, tempfile.TemporaryDirectory() as folder:
        agent = Agent(namespace, Path(folder), _CONFIG.format(more="")).ready()
        main = agent.process.pid
        for number in range(_ROUNDS):
            agent.configure(_CONFIG.format(more="").replace("evil.example.org", f"evil{number}.example.org"))
            for verb in _ROLL_OUT:
                began, used, agents = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN), spent_with_children(main)
                done = agent.verb(*verb, check=False)
                # `plan` has found a difference.
                assert done.returncode == (3 if verb == ("plan",) else 0), done.stdout + done.stderr
                now = resource.getrusage(resource.RUSAGE_CHILDREN)
                command = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
                costs[" ".join(verb)].append((command, spent_with_children(main) - agents, time.monotonic() - began))
        agent.stop()
    for name, found in costs.items():
        words = [f"{statistics.median(each):.2f} s ({min(each):.2f} to {max(each):.2f})" for each in zip(*found, strict=True)]
        print(f"{name}: command {words[0]}, agent {words[1]}, answer after {words[2]}", flush=True)


if __name__ == "__main__":
    roll_out()
    for kind, added in _KINDS.items():
        measure(kind, added)
