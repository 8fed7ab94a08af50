"""The benchmarks of flows that are judged by what they say: `dpi` and a policy of a hundred names, no offload."""

from __future__ import annotations

import re
from functools import partial
from typing import Final

from bed import MAX_LEN, QUEUE, Bed, BenchError
from captures import listening, wait_until
from measure import Benchmark, Goal
from queues import SECONDS, flooded

_PORT: Final = 8080
_HOST: Final = "www.good.test"
_NAMES: Final = ", ".join(['"*.good.test"', *(f'"host-{number}.other.test"' for number in range(99))])
NAMED: Final = f"""elements = ["dpi", "names"]
[element.names]
type = "policy"
default = "drop"
rule = [{", ".join(f'{{ action = "accept", {key} = [{_NAMES}] }}' for key in ("http_host", "tls_sni", "dns_name"))}]
"""
# What is no message of any kind is given up, and then let pass.
_OPEN: Final = NAMED.replace('default = "drop"', 'default = "accept"')
_RULE: Final = f"""
[queue.main]
num = {QUEUE}
max_len = {MAX_LEN}
fail_open = false
ELEMENTS
[rules.app]
queue = "main"
family = "inet"
tcp_ports = [{_PORT}]
"""
_NGINX: Final = f"""
daemon off; master_process off; user root; pid /dev/null; error_log /dev/null;
events {{ worker_connections 1024; }}
http {{ access_log off; keepalive_requests 1000000000; server {{ listen {_PORT}; location / {{ return 200 "ok\\n"; }} }} }}
"""


def _requests(elements: str | None, close: bool = False) -> float:
    """HTTP requests a second of 32 connections, from here to there; close: each on a connection of its own."""
    with Bed() as bed:
        (bed.folder / "nginx.conf").write_text(_NGINX)
        bed.there.start("taskset", "-c", "0", "nginx", "-c", str(bed.folder / "nginx.conf"))
        wait_until(partial(listening, bed.there, _PORT), "nginx listens")
        if elements is not None:
            bed.agent(_RULE.replace("ELEMENTS", elements), core=1)
        header = ["-H", "Connection: close"] if close else []
        done = bed.here.run(
            "taskset", "-c", "0", "wrk", "-t", "1", "-c", "32", "-d", f"{SECONDS + 0.5:.0f}s", "-H", f"Host: {_HOST}", *header,
            f"http://10.203.0.2:{_PORT}/path?query=1", timeout=60,
        )  # fmt: skip
        found = re.search(r"^Requests/sec: +([0-9.]+)$", done.stdout, re.M)
        if found is None or "Non-2xx" in done.stdout:
            raise BenchError(f"wrk says:\n{done.stdout}")
        if elements is not None and bed.judged() < 2 * SECONDS * float(found[1]):
            raise BenchError("not every packet was queued")
        return float(found[1])


BENCHMARKS: Final = (
    Benchmark(
        "named-flood", "64-byte UDP flood on 64 flows that say nothing, dpi and a policy of 100 names", "verdicts/s",
        {"bare accept": flooded, "names": lambda: flooded(_OPEN)},
        (Goal("names", "at least", 0.95, "bare accept"),),
    ),
    Benchmark(
        "named-requests", "HTTP requests, keep-alive, each judged by dpi and a policy of 100 names", "1/s",
        {"no rules": lambda: _requests(None), "bare accept": lambda: _requests(""), "names": lambda: _requests(NAMED)},
        (Goal("names", "at least", 0.95, "bare accept"),),
    ),
    Benchmark(
        "named-connections", "the same, a new connection for each", "1/s",
        {"no rules": lambda: _requests(None, close=True), "bare accept": lambda: _requests("", close=True),
         "names": lambda: _requests(NAMED, close=True)},
        (Goal("names", "at least", 0.95, "bare accept"),),
    ),
)  # fmt: skip
