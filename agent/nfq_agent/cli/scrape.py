"""`nfq-agent metrics`: prints the metrics once, or answers the scrapes of a Prometheus on a socket.

A separate process without the agent's capabilities answers scrapes: it asks for the status as any other client does, and the
agent never waits for it.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from typing import Final
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from nfq_agent.cli import loading, metrics, running
from nfq_agent.cli.flags import Flags
from nfq_agent.host.systemd import passed
from nfq_agent.service import control
from nfq_agent.service.status import Status
from nfq_agent.values import Endpoint

# Seconds without a scrape after which a server that systemd started ends; the next scrape starts it again.
_IDLE: Final = 600.0
# Seconds that a client may take to send its request.
_SLOW: Final = 10.0


class _Live(Collector):
    """Asks the agents at each scrape."""

    def __init__(self, flags: Flags) -> None:
        self._flags = flags

    def collect(self) -> Iterator[Metric]:
        yield from metrics.families(reports(self._flags))


class _Request(WSGIRequestHandler):
    """One scrape, without a line in the log for each."""

    timeout = _SLOW

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: Prometheus itself knows of each scrape."""


class _Server(ThreadingWSGIServer):
    """Serves on a socket that listens already."""

    def __init__(self, listening: socket.socket) -> None:
        super().__init__(listening.getsockname()[:2], _Request, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        host, port = listening.getsockname()[:2]
        self.server_name, self.server_port = str(host), int(port)
        self.setup_environ()
        self.idle = False

    def handle_timeout(self) -> None:
        self.idle = True


def reports(flags: Flags) -> dict[str, Status | None]:
    """The answer of each instance: the requested one, else all that run, else the configured one."""
    running_now = control.instances() if flags.instance is None else []
    names = running_now or [loading.instance_of(flags)]
    return {name: running.status_if_any(name) for name in names}


def show(flags: Flags) -> int:
    """Print the metrics once. The absence of an agent is one of the values, not a failure."""
    print(metrics.text(reports(flags)), end="")
    return 0


def serve(flags: Flags, listen: Endpoint) -> int:
    """Answer scrapes: on the socket that systemd passes, until none comes for ten minutes; else on `listen`."""
    given = next(iter(passed().values()), None)
    try:
        listening = (
            socket.socket(fileno=given)
            if given is not None
            else socket.create_server((listen.host, listen.port), family=_family(listen))
        )
    except OSError as error:
        print(f"nfq-agent: {listen}: {os.strerror(error.errno or 0)}", file=sys.stderr)
        return 1
    registry = CollectorRegistry()
    registry.register(_Live(flags))
    with _Server(listening) as server:
        server.set_app(make_wsgi_app(registry))
        server.timeout = _IDLE if given is not None else None
        while not server.idle:
            server.handle_request()
    return 0


def _family(listen: Endpoint) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in listen.host else socket.AF_INET
