"""What it costs to watch or judge traffic at interfaces, beside no agent and beside NFQUEUE.

Two containers on a bridge. What is measured is the processor time of the control group in which all processes run: sender,
receiver and agent.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from bed import AGENT, BUILT, BenchError
from containers import Container, bridged
from measure import Benchmark, Goal
from namespace import Namespace

from nfq_agent.host.cgroups import mounted

_PORT: Final = 7000
_GIGABYTES: Final = 4
_DATAGRAMS: Final = 300_000
_RATE: Final = 60_000
_CONNECTIONS: Final = 6000
_POLICY: Final = """
[element.verdicts]
type = "policy"
default = "accept"
rule = [ { action = "drop", dst = "198.51.100.0/24" } ]
"""
_NAMES: Final = """
[element.verdicts]
type = "policy"
default = "accept"
rule = [ { action = "drop", http_host = ["*.blocked.test"] } ]
"""
_OFFLOAD: Final = '[element.offload]\nmark = "0x4e000000/0xff000000"\n'
_CONFIGS: Final = {
    "no agent": "",
    "NFQUEUE": f"""
[queue.main]
num = 100
max_len = 8192
elements = ["verdicts"]
[rules.bench]
queue = "main"
hooks = ["forward"]
interface = "veth1"
bridge = true
PORTS
{_POLICY}""",
    "tap": f'[tap.bench]\ninterfaces = ["veth1"]\nPORTS\nelements = ["verdicts"]\n{_POLICY}',
    "tap, names": f'[tap.bench]\ninterfaces = ["veth1"]\nPORTS\nelements = ["dpi", "verdicts"]\n{_NAMES}',
    "inline": f'[inline.bench]\ninterfaces = ["veth1"]\nPORTS\nelements = ["verdicts"]\nmax_waiting = 100000\n'
              f'patience = "10s"\n{_POLICY}',
    "inline, offload": f'[inline.bench]\ninterfaces = ["veth1"]\nPORTS\nelements = ["verdicts", "offload"]\n{_OFFLOAD}{_POLICY}',
}  # fmt: skip


class _Group:
    """A control group with this process in it, until it is left."""

    def __init__(self) -> None:
        root = mounted()
        if root is None:
            raise BenchError("no control groups of version 2")
        own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        self._before = root / own[3:].strip("/") / "cgroup.procs"
        self._folder = root / f"nfq-agent-bench-{os.getpid()}"

    def __enter__(self) -> _Group:
        self._folder.mkdir()
        (self._folder / "cgroup.procs").write_text(str(os.getpid()))
        return self

    def __exit__(self, *_: object) -> None:
        self._before.write_text(str(os.getpid()))
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    @property
    def seconds(self) -> float:
        """Of processor time so far."""
        found = re.search(r"usage_usec (\d+)", (self._folder / "cpu.stat").read_text())
        assert found is not None
        return int(found[1]) / 1e6


def _bulk(first: Container, second: Container) -> float:
    server = second.start("iperf3", "-s", "-1", "-p", str(_PORT), "--forceflush", stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    while "listening" not in server.stdout.readline():
        if server.poll() is not None:
            raise BenchError("iperf3 does not serve")
    done = first.run("iperf3", "-J", "-c", "10.5.0.2", "-p", str(_PORT), "-n", f"{_GIGABYTES}G", timeout=120)
    return float(json.loads(done.stdout)["end"]["sum_received"]["bytes"]) / (_GIGABYTES << 30)


def _datagrams(first: Container, second: Container) -> float:
    # Takes them, so that the kernel sends no ICMP error; never reads.
    sink = f"import socket, time; s = socket.socket(type=2); s.bind(('', {_PORT})); print('ready', flush=True); time.sleep(99)"
    server = second.start("python3", "-c", sink, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    server.stdout.readline()
    done = first.run(str(BUILT / "load"), "burst", "10.5.0.2", str(_PORT), str(_DATAGRAMS), "32", str(_RATE), timeout=120)
    return int(done.stdout) / _DATAGRAMS


def _connections(first: Container, second: Container) -> float:
    server = second.start(str(BUILT / "load"), "serve", "close", str(_PORT), stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    server.stdout.readline()
    done = first.run(str(BUILT / "load"), "connect", "10.5.0.2", str(_PORT), "16", "1", timeout=120)
    rate, failed = map(float, done.stdout.split())
    if failed:
        raise BenchError(f"{failed:.0f} connections failed")
    return rate / _CONNECTIONS


@contextlib.contextmanager
def _agent(host: Namespace, folder: Path, config: str) -> Iterator[Callable[[], dict[str, Any]]]:
    if not config:
        yield dict
        return
    (folder / "agent.toml").write_text(config)
    with (folder / "log").open("wb") as log:
        process = host.start(str(AGENT), "run", "--config", str(folder / "agent.toml"), stdout=log, stderr=log)
    deadline = time.monotonic() + 30
    while "is serving" not in (folder / "log").read_text():
        if time.monotonic() > deadline or process.poll() is not None:
            raise BenchError(f"the agent did not become ready: {(folder / 'log').read_text()}")
        time.sleep(0.1)
    try:
        yield lambda: dict(json.loads(host.run(str(AGENT), "status", "--json").stdout))
    finally:
        process.terminate()
        process.wait(timeout=20)


def cost(name: str, load: Callable[[Container, Container], float]) -> float:
    """Seconds of processor time for the whole load: what was taken, divided by the part of the load that was done."""
    with _Group() as group, tempfile.TemporaryDirectory() as folder, Namespace() as host:
        first, second = bridged(host)
        host.shell(f"echo {int(name == 'NFQUEUE')} >/proc/sys/net/bridge/bridge-nf-call-iptables")
        for side in (first, second):
            side.shell("sysctl -qw net.ipv4.ip_local_port_range='1024 65000' net.ipv4.tcp_max_tw_buckets=1000000")
        # UDP in a queue makes the kernel cut large segments: each load has a queue of its own kind.
        ports = f"{'udp' if load is _datagrams else 'tcp'}_ports = [{_PORT}]"
        with _agent(host, Path(folder), _CONFIGS[name].replace("PORTS", ports)) as status:
            time.sleep(0.3)
            before = group.seconds
            part = load(first, second)
            taken = group.seconds - before
            if report := status():
                _show(name, report)
        return taken / part


def _show(name: str, report: dict[str, Any]) -> None:
    """Print what the agent counted, and the processor time of its worker in its own code and in the kernel."""
    workers = [each for queue in report["queues"] for each in queue["workers"]]
    told = [(each["pid"], each["counters"]) for kind in ("taps", "inlines") for each in report[kind]]
    told += [(each["pid"], {key: each[key] for key in ("received", "accepted")}) for each in workers]
    told += [(each["pid"], {"uninspected": report["queues"][0]["uninspected"]}) for each in workers]
    for pid, counters in told:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        spent = [int(word) / os.sysconf("SC_CLK_TCK") for word in words[11:13]]
        said = ", ".join(f"{key} {value}" for key, value in counters.items() if value)
        print(f"  {name}: worker {spent[0]:.2f} + {spent[1]:.2f} s; {said}")


_LOADS: Final = (
    ("interfaces-bulk", f"{_GIGABYTES} GiB of TCP", _bulk),
    ("interfaces-datagrams", f"{_DATAGRAMS} datagrams", _datagrams),
    ("interfaces-connections", f"{_CONNECTIONS} connections", _connections),
)
BENCHMARKS: Final = tuple(
    Benchmark(
        name, f"{title} between two containers", "s of CPU", {each: partial(cost, each, load) for each in _CONFIGS},
        (
            Goal("tap", "at most", 1.2, "no agent"),
            Goal("inline", "at most", 1.5, "NFQUEUE"),
            *((Goal("inline, offload", "at most", 1.1, "no agent"),) if load is _bulk else ()),
        ),
    )
    for name, title, load in _LOADS
)  # fmt: skip
