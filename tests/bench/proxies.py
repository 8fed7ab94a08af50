"""The benchmarks of the transparent proxy, beside HAProxy in TCP mode; both redirected to, both one process of one thread."""

from __future__ import annotations

import time
from functools import partial
from typing import Final

from bed import Bed, BenchError
from measure import Benchmark, Goal

SECONDS: Final = 2
_PORT: Final = 7000
_LISTEN: Final = 15002
_AGENT: Final = f"""
[proxy.tcp]
listen = ["0.0.0.0:{_LISTEN}"]

[rules.redirect]
proxy = "tcp"
family = "inet"
hooks = ["output"]
tcp_ports = [{_PORT}]
role = "client"
"""
# It goes where the connection was going, as the agent does.
_HAPROXY: Final = f"""
global
    nbthread 1
    maxconn 4000
    user haproxy
    group haproxy
defaults
    mode tcp
    timeout connect 5s
    timeout client 60s
    timeout server 60s
listen tcp
    bind 0.0.0.0:{_LISTEN}
    option transparent
"""


def _agent(bed: Bed) -> None:
    bed.agent(_AGENT)


def _haproxy(bed: Bed) -> None:
    path = bed.folder / "haproxy.cfg"
    path.write_text(_HAPROXY)
    # In the foreground: a daemon would outlive its namespace.
    bed.here.start("haproxy", "-db", "-f", str(path))
    deadline = time.monotonic() + 10
    while not bed.here.shell(f"ss -ltnH sport = :{_LISTEN}"):
        if time.monotonic() > deadline:
            raise BenchError("HAProxy does not listen")
        time.sleep(0.05)
    bed.here.shell(
        f"iptables-legacy -t nat -A OUTPUT -p tcp --dport {_PORT} -m owner ! --uid-owner haproxy -j REDIRECT --to-ports {_LISTEN}"
    )


def _nothing(bed: Bed) -> None:
    """No proxy."""


_VARIANTS: Final = {"agent": _agent, "HAProxy": _haproxy, "no proxy": _nothing}


def _bulk(bed: Bed) -> float:
    return bed.bulk(_PORT, SECONDS) / 1e9


def _connect(bed: Bed) -> float:
    bed.serve("close", _PORT)
    rate, failed = bed.load("connect", "10.203.0.2", _PORT, 64, SECONDS)
    if failed:
        raise BenchError(f"{failed:.0f} connections failed")
    return rate


def _exchange(bed: Bed) -> float:
    bed.serve("echo", _PORT)
    return bed.load("ask", "tcp", "10.203.0.2", _PORT, SECONDS)[1]


def _through(name: str, load: object) -> float:
    with Bed() as bed:
        _VARIANTS[name](bed)
        figure: float = load(bed)  # type: ignore[operator]  # one of those above
        if name != "no proxy" and not _redirected(bed):
            raise BenchError("nothing was redirected")
        return figure


def _redirected(bed: Bed) -> bool:
    counted = bed.here.run("iptables-legacy-save", "-c", "-t", "nat").stdout.splitlines()
    return any("REDIRECT" in line and not line.startswith("[0:0]") for line in counted)


BENCHMARKS: Final = tuple(
    Benchmark(
        name, title, unit, {each: partial(_through, each, load) for each in _VARIANTS}, (goal,)
    )
    for name, title, unit, load, goal in (
        ("proxy-bulk", "one stream through the proxy", "Gbit/s", _bulk, Goal("agent", "at least", 1.4, "HAProxy")),
        ("proxy-connections", "new connections through the proxy", "1/s", _connect, Goal("agent", "at least", 1.0, "HAProxy")),
        ("proxy-exchange", "64 bytes there and back through the proxy, median", "us", _exchange,
         Goal("agent", "at most", 1.0, "HAProxy")),
    )
)  # fmt: skip
