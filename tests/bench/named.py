"""The benchmarks of flows that are judged by what they say: `dpi` and a policy of a hundred names, no offload."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Final

import suricata
from agent import until
from bed import MAX_LEN, QUEUE, Bed, BenchError
from captures import listening
from measure import Benchmark, Goal
from queues import SECONDS, flooded, flooded_through

_PORT: Final = 8080
_HOST: Final = "www.good.test"
NAMES: Final = ("*.good.test", *(f"host-{number}.other.test" for number in range(99)))
_NAMES: Final = ", ".join(f'"{name}"' for name in NAMES)
NAMED: Final = f"""elements = ["dpi", "names"]
[element.names]
type = "policy"
default = "drop"
rule = [{", ".join(f'{{ action = "accept", {key} = [{_NAMES}] }}' for key in ("http_host", "tls_sni", "dns_name"))}]
"""
_OFFLOAD: Final = NAMED.replace('"names"]', '"names", "offload"]') + '[element.offload]\nmark = "0x4e000000/0xff000000"\n'
_AUTO: Final = 'busy_poll = "auto"\n'
# What is not a message of any kind is given up, and then let pass.
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
http {{ access_log off; keepalive_requests 1000000000;
server {{ listen {_PORT}; listen [::]:{_PORT}; location / {{ return 200 "ok\\n"; }} }} }}
"""


# Paths that vary, and with `new` hosts that vary too.
_VARIED: Final = """
local number = 0
request = function()
  number = number + 1
  if new then wrk.headers["Host"] = "host-" .. number .. ".good.test" end
  return wrk.format("GET", "/path/" .. number .. "?query=" .. number)
end
"""


def _requests(  # one for each thing that differs
    elements: str | None = None, *, close: bool = False, new: bool = False, batch: int = 0, judged: bool = True, family: int = 4
) -> float:
    """HTTP requests a second of 32 connections, from here to there, each with another path.

    close: each on a connection of its own. new: each for another host. batch: of Suricata, 0 for the agent. judged: all packets
    are queued.
    """
    with Bed() as bed:
        address, iptables = ("10.203.0.2", "iptables-legacy") if family == 4 else ("[fd00:203::2]", "ip6tables-legacy")
        (bed.folder / "nginx.conf").write_text(_NGINX)
        script = bed.folder / "varied.lua"
        script.write_text(f"local new = {str(new).lower()}\n{_VARIED}")
        bed.there.start("taskset", "-c", "0", "nginx", "-c", str(bed.folder / "nginx.conf"))
        until(partial(listening, bed.there, _PORT), "nginx listens")
        if batch:
            suricata.serve(bed, NAMES, closed=True, batch=batch)
            for hook, port in product(("INPUT", "OUTPUT"), ("dport", "sport")):
                bed.here.shell(f"{iptables} -t mangle -A {hook} -p tcp --{port} {_PORT} -j NFQUEUE --queue-num {QUEUE}")
        elif elements is not None:
            rule = _RULE if family == 4 else _RULE.replace('"inet"', '"inet6"')
            bed.agent(rule.replace("ELEMENTS", elements), core=1)
        header = ["-H", "Connection: close"] if close else []
        done = bed.here.run(
            "taskset", "-c", "0", "wrk", "-t", "1", "-c", "32", "-d", f"{SECONDS + 0.5:.0f}s", "-H", f"Host: {_HOST}", *header,
            "-s", str(script), f"http://{address}:{_PORT}/", timeout=60,
        )  # fmt: skip
        found = re.search(r"^Requests/sec: +([0-9.]+)$", done.stdout, re.M)
        if found is None or "Non-2xx" in done.stdout:
            raise BenchError(f"wrk says:\n{done.stdout}")
        if (batch or elements is not None) and judged and bed.judged() < 2 * SECONDS * float(found[1]):
            raise BenchError("not every packet was queued")
        return float(found[1])


def _flooded_suricata(flows: int, batch: int = 20) -> float:
    with Bed() as bed:
        suricata.serve(bed, NAMES, closed=False, batch=batch)
        return flooded_through(bed, flows)


def _flood_benchmark(name: str, flows: int) -> Benchmark:
    what = f"64-byte UDP flood, flows that say nothing: {flows:,}; dpi and a policy of 100 names"
    return Benchmark(
        name, what, "verdicts/s",
        {
            "bare accept": partial(flooded, "", flows),
            "names": partial(flooded, _OPEN, flows),
            "Suricata": partial(_flooded_suricata, flows),
            "Suricata, batches of 255": partial(_flooded_suricata, flows, 255),
        },
        (Goal("names", "at least", 0.95, "bare accept"), Goal("names", "at least", 1.2, "Suricata"),
         Goal("names", "at least", 1.2, "Suricata, batches of 255")),
    )  # fmt: skip


def _fresh(series: str, kind: str, elements: str | None = None, *, batch: int = 0) -> dict[str, float]:
    """Answered datagrams a second, each of a new flow, and with `dns` of a new name; and the share that was not answered.

    batch: of Suricata, 0 for the agent. Without it and without elements there are no rules.
    """
    port = 53 if kind == "dns" else _PORT
    with Bed() as bed:
        if batch:
            suricata.serve(bed, NAMES, closed=kind == "dns", batch=batch)
            for hook, way in product(("INPUT", "OUTPUT"), ("dport", "sport")):
                bed.here.shell(f"iptables-legacy -t mangle -A {hook} -p udp --{way} {port} -j NFQUEUE --queue-num {QUEUE}")
        elif elements is not None:
            rule = _RULE.replace(f"tcp_ports = [{_PORT}]", f"udp_ports = [{port}]")
            bed.agent(rule.replace("ELEMENTS", elements), core=1)
        bed.serve("answers" if kind == "dns" else "datagrams", port, core=0)
        answered, lost = bed.load("fresh", kind, "10.203.0.2", port, 64, SECONDS, core=0)
        if (batch or elements is not None) and bed.judged() < 2 * SECONDS * answered:
            raise BenchError("not every packet was queued")
        return {series: answered, f"{series}, not answered": lost}


def _fresh_benchmark(name: str, kind: str, what: str, elements: str) -> Benchmark:
    peers = ("Suricata", "Suricata, batches of 255")
    lost = "names, not answered"
    return Benchmark(
        name, what, "",
        {
            "no rules": partial(_fresh, "no rules", kind),
            "bare accept": partial(_fresh, "bare accept", kind, ""),
            "names": partial(_fresh, "names", kind, elements),
            "names, auto": partial(_fresh, "names, auto", kind, _AUTO + elements),
            **{peer: partial(_fresh, peer, kind, batch=batch) for peer, batch in zip(peers, (20, 255), strict=True)},
        },
        (*(Goal(ours, "at least", 1.0, peer) for ours in ("names", "names, auto") for peer in peers),
         Goal(lost, "at most", 0.0), Goal("names, auto, not answered", "at most", 0.0)),
    )  # fmt: skip


def _rows(close: bool = False, new: bool = False, family: int = 4) -> dict[str, Callable[[], float]]:
    requests = partial(_requests, close=close, new=new, family=family)
    return {
        "no rules": requests,
        "bare accept": partial(requests, ""),
        "names": partial(requests, NAMED),
        "names, auto": partial(requests, _AUTO + NAMED),
        "Suricata": partial(requests, batch=20),
        "Suricata, batches of 255": partial(requests, batch=255),
    }


_GOALS: Final = tuple(
    Goal(ours, "at least", ratio, peer)
    for ours in ("names", "names, auto")
    for ratio, peer in ((0.95, "bare accept"), (1.5, "Suricata"), (1.5, "Suricata, batches of 255"))
)
BENCHMARKS: Final = (
    _flood_benchmark("named-flood", 64),
    _flood_benchmark("named-flood-1", 1),
    _flood_benchmark("named-flood-10000", 10_000),
    _fresh_benchmark("named-udp", "plain", "UDP, each datagram a new flow that says nothing, answered a second", _OPEN),
    _fresh_benchmark("named-dns", "dns", "DNS, each query a new flow and a new name, answered a second", NAMED),
    Benchmark(
        "named-requests", "HTTP requests, keep-alive, each judged by dpi and a policy of 100 names", "1/s", _rows(), _GOALS,
    ),
    Benchmark("named-requests-6", "the same over IPv6", "1/s", _rows(family=6), _GOALS),
    Benchmark("named-connections", "the same, a new connection for each", "1/s", _rows(close=True), _GOALS),
    Benchmark("named-connections-6", "the same over IPv6", "1/s", _rows(close=True, family=6), _GOALS),
    Benchmark(
        "named-hosts", "the same, a new connection and another host for each", "1/s", _rows(close=True, new=True), _GOALS,
    ),
    Benchmark("named-hosts-6", "the same over IPv6", "1/s", _rows(close=True, new=True, family=6), _GOALS),
    Benchmark(
        "named-offload", "a new connection for each request, dpi, a policy of 100 names and offload", "1/s",
        {"no rules": lambda: _requests(close=True), "names": lambda: _requests(_OFFLOAD, close=True, judged=False)},
        (Goal("names", "at least", 0.85, "no rules"),),
    ),
)  # fmt: skip
