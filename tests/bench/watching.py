"""The benchmarks of `top` and `trace`: what they cost a worker that is watched, and one that was; and a million flows."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from typing import Final

from bed import AGENT, Agent, Bed, BenchError
from measure import Benchmark, Goal
from million import OF_EACH, SOURCES, frames
from queues import FLOOD_PORT, FLOOD_RULE, SERVED

from nfq_agent.testing import udp

_PORT: Final = 8080
_FLOWS: Final = 64
_SECONDS: Final = 1.0
# After a client's last question the worker tells on for five seconds.
_FORGOTTEN: Final = 6.0
_ELEMENTS: Final = """elements = ["dpi", "names"]
[element.names]
type = "policy"
default = "accept"
rule = [{ action = "drop", name = "none", tls_sni = ["none.test"] }]
"""
_RULE: Final = f"""
[rules.fresh]
queue = "main"
family = "inet"
hooks = ["input"]
udp_ports = [{_PORT}]
role = "server"
"""
# Datagrams in a burst, and seconds from one to the next: 25,000 a second, which the worker takes beside other work.
_BURST, _PAUSE = 250, 0.01
# Asks and draws as `top` does, and tells how long each turn took: the answer, and the drawing, in milliseconds.
_TOP: Final = """
import io, json, sys, time
from rich.console import Console
from nfq_agent.cli.flow_records import EVERY, Questions
from nfq_agent.cli.live_flows import LiveFlows, View
from nfq_agent.cli.top import Screen
questions, live = Questions("default", None), LiveFlows()
screen = Screen("default", live, View())
asked, drawn, most = [], [], 0
until = time.monotonic() + float(sys.argv[1])
while time.monotonic() < until:
    begin = time.monotonic()
    records = questions.ask()
    asked.append(time.monotonic() - begin)
    begin = time.monotonic()
    live.add(records, begin)
    console = Console(width=80, height=24, force_terminal=True, file=io.StringIO())
    console.print(screen.draw(80, 24, time.monotonic()))
    drawn.append(time.monotonic() - begin)
    most = max(most, len(live))
    time.sleep(max(0.0, EVERY - asked[-1] - drawn[-1]))
print(json.dumps({"asked": max(asked) * 1e3, "drawn": max(drawn) * 1e3, "flows": most, "missed": questions.missed}))
"""


def _watching(bed: Bed, *argv: str) -> subprocess.Popen[bytes]:
    config = str(bed.folder / "agent.toml")
    return bed.here.start(str(AGENT), *argv, "--config", config, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _cost(bed: Bed, agent: Agent) -> float:
    """Microseconds of the worker's CPU for a packet of the flood."""
    before, judged = agent.worker_seconds(), bed.judged()
    bed.load("flood", "127.0.0.1", FLOOD_PORT, _FLOWS, _SECONDS, core=0)
    count = bed.judged() - judged
    if count < 1000:
        raise BenchError(f"{count} packets: the flood does not reach the queue")
    return (agent.worker_seconds() - before) / count * 1e6


def _traced() -> dict[str, float]:
    """One agent, in this order: before any watch, while one watches, and after its end. Each figure is the less of two."""
    with Bed() as bed:
        agent = bed.agent(SERVED + _ELEMENTS + FLOOD_RULE, core=1)
        _cost(bed, agent)
        never = min(_cost(bed, agent) for _ in range(2))
        trace = _watching(bed, "trace", "dport = 1 and verdict = drop", "--for", "600")
        time.sleep(1.5)
        traced = min(_cost(bed, agent) for _ in range(2))
        trace.terminate()
        trace.wait()
        top = _watching(bed, "top", "--json", "--for", "600")
        time.sleep(1.5)
        shown = min(_cost(bed, agent) for _ in range(2))
        top.terminate()
        top.wait()
        time.sleep(_FORGOTTEN)
        after = min(_cost(bed, agent) for _ in range(2))
        return {"never watched": never, "trace that meets nothing": traced, "top": shown, "no longer watched": after}


def _send(server: bytes) -> None:
    """Send a datagram of each of a million flows, from here. server: its link-layer address."""
    due = time.monotonic()
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind(("eth0", socket.htons(0x0800)))
        for number, frame in enumerate(frames(server, lambda client: udp(client, f"10.203.0.1:{_PORT}", b"hello"))):
            raw.send(frame)
            if number % _BURST == 0:
                due += _PAUSE
                time.sleep(max(0.0, due - time.monotonic()))


def _million(with_top: bool) -> dict[str, float]:
    """What the queue lost of a million flows, and how long a turn of `top` took."""
    series = "with top" if with_top else "without"
    with Bed() as bed:
        # Answers to sources that do not exist go nowhere.
        bed.here.shell("ip route add blackhole 10.64.0.0/10")
        bed.agent(SERVED + _ELEMENTS + _RULE, core=1)
        bed.serve("datagrams", _PORT, core=0, side=bed.here)
        top = None
        if with_top:
            seconds = 1.5 * SOURCES * OF_EACH / _BURST * _PAUSE
            top = bed.here.start(sys.executable, "-c", _TOP, str(seconds), stdout=subprocess.PIPE, text=True)
            time.sleep(1)
        bed.there.call(_send, bed.link_address())
        # The last ones are on their way.
        time.sleep(0.5)
        lost = sum(queue.dropped + queue.user_dropped for queue in bed.queues())
        found = {f"{series}: packets lost": float(lost), f"{series}: judged": float(bed.judged())}
        if top is not None:
            assert top.stdout is not None
            said = json.loads(top.stdout.read())
            found |= {"slowest answer, ms": said["asked"], "slowest drawing, ms": said["drawn"], "flows shown": said["flows"]}
        return found


BENCHMARKS: Final = (
    Benchmark(
        "watching", "UDP flood of 64 flows, dpi and a policy: a worker that is watched, and one that was", "us of CPU a packet",
        {"one agent": _traced},
        (Goal("no longer watched", "at most", 1.03, "never watched"),),
    ),
    Benchmark(
        "million", "a million UDP flows of one datagram each beside `top`", "",
        {"without": lambda: _million(False), "with top": lambda: _million(True)},
        (Goal("with top: packets lost", "at most", 0), Goal("slowest drawing, ms", "at most", 500)),
    ),
)  # fmt: skip
