"""Evasions across something that happens to the agent: the connection began before it, the message comes after it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from functools import partial

from agent import Agent, until
from evasion_attempt import Attempt
from evasion_bed import Bed
from evasion_config import NGINX
from evasion_line import Line


def _request(name: str, path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: {name}\r\n\r\n".encode()


def _across(event: str, attempt: Attempt, name: str) -> None:
    """An allowed request, the event, and another request on the same connection."""
    with attempt.tcp(NGINX) as connection:
        connection.sendall(_request(attempt.allowed, "/before"))
        attempt.drain(connection, 0.3)
        attempt.wait_for(event)
        connection.sendall(_request(name, "/after"))
        attempt.drain(connection, 1)
        attempt.note(f"done {event}")


def _split(event: str, attempt: Attempt, name: str) -> None:
    """Half a request, the event, and the other half; behind an allowed request, and as the first one."""
    request = _request(name, "/split")
    cut = request.index(name.encode()) + 3
    connections = [attempt.tcp(NGINX) for _ in range(2)]
    connections[0].sendall(_request(attempt.allowed, "/before"))
    attempt.drain(connections[0], 0.3)
    for connection in connections:
        connection.sendall(request[:cut])
    # Until the agent has seen it.
    time.sleep(0.3)
    attempt.wait_for(event)
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.sendall(request[cut:])
        attempt.drain(connection)
        connection.close()
    attempt.note(f"done {event}")


def _kill_the_worker(agent: Agent, bed: Bed) -> None:
    os.kill(agent.queue("egress")["workers"][0]["pid"], signal.SIGKILL)
    until(lambda: any("serves again" in line for line in bed.log()), "another worker serves")


def _reload(agent: Agent, bed: Bed) -> None:
    bed.configure('", "one.more.test')
    agent.verb("reload")


def _restart(agent: Agent, bed: Bed) -> None:
    agent.verb("restart")


def _crash(agent: Agent, bed: Bed) -> None:
    agent.kill()
    agent.start()
    agent.ready()


# In this order.
EVENTS: dict[str, tuple[str, Callable[[Agent, Bed], None]]] = {
    "worker-killed": ("the worker is killed", _kill_the_worker),
    "name-added": ("a reload adds a name to the list", _reload),
    "restart": ("the agent is restarted", _restart),
    "crash": ("the agent is killed and started again", _crash),
}

LINES = tuple(
    Line(
        event, f"HTTP, behind an allowed request: a second one on the connection, after {text}", partial(_across, event),
        twin=True, phase="event", outcome="blocked; an allowed one arrives",
    )
    for event, (text, _) in EVENTS.items()
) + tuple(
    Line(
        f"split-{event}", f"HTTP: a request of which the second half comes after {text}", partial(_split, event), phase="event",
        outcome="blocked; an allowed one is cut too, because its name is not known",
    )
    for event, (text, _) in EVENTS.items()
)  # fmt: skip
