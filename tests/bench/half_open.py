"""The benchmark of a flood of a million half-open flows: what memory it takes, and a user's connections beside it."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Mapping
from multiprocessing.pool import ThreadPool
from typing import Final

from bed import QUEUE, Bed
from measure import Benchmark, Goal
from million import frames
from named import NAMED

from nfq_agent.testing import tcp

_PORT: Final = 7000
_USER_SECONDS: Final = 15.0
_CONFIG: Final = f"""
[queue.main]
num = {QUEUE}
{NAMED}
[rules.app]
queue = "main"
family = "inet"
tcp_ports = [{_PORT}]
role = "server"
"""


def _flood(server: bytes) -> None:
    """Send the first packet of each connection, from here. server: its link-layer address."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind(("eth0", socket.htons(0x0800)))
        for frame in frames(server, lambda client: tcp(client, f"10.203.0.1:{_PORT}", flags="S")):
            raw.send(frame)


def _connections() -> tuple[int, int]:
    """The connections of a user, 20 a second: how many the server answered, and how many failed."""
    done = failed = 0
    end = time.monotonic() + _USER_SECONDS
    while time.monotonic() < end:
        failed += 1
        with contextlib.suppress(OSError), socket.create_connection(("10.203.0.1", _PORT), timeout=5) as user:
            user.recv(1)
            done, failed = done + 1, failed - 1
        time.sleep(0.05)
    return done, failed


def _measured() -> Mapping[str, float]:
    with Bed() as bed:
        # Answers to sources that do not exist go nowhere.
        bed.here.shell("ip route add blackhole 10.64.0.0/10")
        agent = bed.agent(_CONFIG)
        bed.serve("close", _PORT, side=bed.here)
        with ThreadPool(2) as pool:
            flood = pool.apply_async(bed.there.call, (_flood, bed.link_address()))
            user = pool.apply_async(bed.there.call, (_connections,))
            most = 0
            while not flood.ready():
                most = max(most, agent.memory())
                time.sleep(0.25)
            flood.get()
            done, failed = user.get()
        return {
            "memory, MB": max(most, agent.memory()) / 1e6,
            "packets judged": bed.judged(),
            "user's connections": done,
            "user's connections that failed": failed,
        }


BENCHMARKS: Final = (
    Benchmark(
        "half-open", "a million half-open flows, dpi and a policy of 100 names; a user's connections beside them", "",
        {"agent": _measured},
        (Goal("memory, MB", "at most", 64), Goal("user's connections that failed", "at most", 0)),
    ),
)  # fmt: skip
