"""The benchmarks of the agent on its host: rules among many, the lock, the start, memory."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from bed import AGENT, ROOT, Bed
from measure import Benchmark, Goal

from nfq_agent.config.file import load
from nfq_agent.host.xtables.backend import choose
from nfq_agent.rules.plan import plan
from nfq_agent.service.live_rules import LiveRules

_FOREIGN: Final = 20_000
_BASELINE: Final = ROOT / "tests" / "configs" / "baseline.toml"
_UID: Final = 971
_FAMILIES: Final = (("iptables-legacy", "10.9"), ("ip6tables-legacy", "fd09:"))


def _foreign(tool: str) -> str:
    """Foreign rules in the table of our rules, for iptables-restore."""
    lines = ["*mangle", ":OTHERS - [0:0]", "-A INPUT -j OTHERS", "-A OUTPUT -j OTHERS"]
    for number in range(_FOREIGN - 2):
        high, low = number >> 8, number & 255
        source = f"10.9.{high}.{low}/32" if tool == "iptables-legacy" else f"fd09::{high:x}:{low:x}/128"
        lines.append(f"-A OTHERS -s {source} -p tcp -m tcp --dport {1 + number} -j RETURN")
    return "\n".join([*lines, "COMMIT", ""])


class LockWatch:
    """How long another process held the xtables lock of a namespace, as /proc/locks shows it to a process that only looks."""

    def __init__(self, bed: Bed) -> None:
        lock = os.stat(f"/proc/{bed.here.pid}/root/run/xtables.lock")
        self._file = f" {os.major(lock.st_dev):02x}:{os.minor(lock.st_dev):02x}:{lock.st_ino} ".encode()

    def __enter__(self) -> LockWatch:
        reader, writer = os.pipe()
        self._reader = reader
        self._child = os.fork()
        if self._child == 0:
            self._watch(writer)
        os.close(writer)
        return self

    def _watch(self, writer: int) -> None:
        """Look, again and again, until told to end; then say the seconds."""
        told: list[int] = []
        signal.signal(signal.SIGTERM, lambda *_: told.append(1))
        held = 0.0
        locks = os.open("/proc/locks", os.O_RDONLY)
        last, was = time.monotonic(), False
        limit = last + 30
        while not told and last < limit:
            there = self._file in os.pread(locks, 65536, 0)
            now = time.monotonic()
            if there and was:
                held += now - last
            last, was = now, there
            # What is measured needs both processors.
            time.sleep(0.0001)
        os.write(writer, repr(held).encode())
        os._exit(0)

    def __exit__(self, *_: object) -> None:
        os.kill(self._child, signal.SIGTERM)
        os.waitpid(self._child, 0)
        self.held = float(os.read(self._reader, 64))
        """Seconds."""
        os.close(self._reader)


def _timed(work: Callable[[], Any]) -> float:
    begin = time.monotonic()
    work()
    return (time.monotonic() - begin) * 1e3


def _ours(bed: Bed) -> dict[str, list[str]]:
    """The lines of our rules, as iptables-save has them, by command."""
    saved = {tool: bed.here.run(f"{tool}-save", "-t", "mangle").stdout.splitlines() for tool, _ in _FAMILIES}
    return {tool: [line for line in lines if "NFQA-" in line] for tool, lines in saved.items()}


def _removal(lines: list[str]) -> list[str]:
    chains = [line.split()[0][1:] for line in lines if line.startswith(":")]
    jumps = [line.replace("-A ", "-D ", 1) for line in lines if line.startswith("-A") and not line.startswith("-A NFQA-")]
    return jumps + [f"-F {chain}" for chain in chains] + [f"-X {chain}" for chain in chains]


def _restore(texts: dict[str, list[str]]) -> float:
    """iptables-restore of both families; milliseconds. Runs inside."""

    def work() -> None:
        for tool, lines in texts.items():
            text = "\n".join(["*mangle", *lines, "COMMIT", ""])
            subprocess.run([f"{tool}-restore", "--noflush", "-w"], input=text, text=True, check=True)

    return _timed(work)


def _agent_rules(installation: LiveRules, remove: bool) -> float:
    """Ours; milliseconds. Runs inside."""
    desired = plan(load(_BASELINE), _UID)
    return _timed(installation.remove if remove else lambda: installation.apply(desired))


def _rules(agent: bool) -> dict[str, float]:
    who = "agent" if agent else "iptables-restore"
    with Bed() as bed:
        for tool, _ in _FAMILIES:
            bed.here.run(f"{tool}-restore", input=_foreign(tool))
        installation: LiveRules = bed.here.call(lambda: LiveRules(choose("legacy", "default")))
        found = {}
        # The first commits in a new namespace meet memory that is not touched yet; both are measured after that.
        bed.here.call(_agent_rules, installation, False)
        lines = _ours(bed)
        bed.here.call(_agent_rules, installation, True)
        steps: list[tuple[str, Callable[..., float], tuple[Any, ...]]]
        if agent:
            steps = [("apply", _agent_rules, (installation, False)), ("remove", _agent_rules, (installation, True))]
        else:
            removal = {tool: _removal(each) for tool, each in lines.items()}
            steps = [("apply", _restore, (lines,)), ("remove", _restore, (removal,))]
        for step, work, arguments in steps:
            with LockWatch(bed) as watch:
                found[f"{step}, {who}"] = bed.here.call(work, *arguments)
            found[f"{step}, lock, {who}"] = watch.held * 1e3
        assert not any(_ours(bed).values()), "rules of ours were left"
        return found


_SMALL: Final = '[queue.main]\nnum = 100\n[rules.app]\nqueue = "main"\ntcp_ports = [11000]\n'
_PORTS: Final = ", ".join(map(str, range(1, 20001, 2)))


def _life(backend: str, text: str, foreign: bool) -> dict[str, float]:
    """Start to READY, `status` as a program of its own, and stop: milliseconds."""
    with Bed() as bed:
        if foreign:
            for tool, _ in _FAMILIES:
                bed.here.run(f"{tool}-restore", input=_foreign(tool))
        text = f'[agent]\nbackend = "{backend}"\n{text}'
        # The first one creates the user, and meets memory that is not touched yet.
        bed.agent(text).stop()
        agent = bed.agent(text)
        status = _timed(lambda: bed.here.run(str(AGENT), "status", "--json", "--config", str(bed.folder / "agent.toml")))
        return {
            f"start to READY, {backend}": agent.started * 1e3,
            f"status, {backend}": status,
            f"stop, {backend}": _timed(agent.stop),
        }


def _backend_benchmark(name: str, what: str, text: str, foreign: bool) -> Benchmark:
    return Benchmark(
        name, what, "ms",
        {backend: partial(_life, backend, text, foreign) for backend in ("legacy", "owned")},
        (),
    )  # fmt: skip


def _start() -> dict[str, float]:
    """Seconds to READY on a host that has the system user, and megabytes then."""
    with Bed() as bed:
        # The first one makes the user.
        bed.agent(_BASELINE.read_text()).stop()
        agent = bed.agent(_BASELINE.read_text())
        return {"start to READY, s": agent.started, "memory, MB": agent.memory() / 1e6}


BENCHMARKS: Final = (
    Benchmark(
        "rules", "the baseline among 20,000 foreign rules, both families", "ms",
        {"agent": lambda: _rules(True), "iptables-restore": lambda: _rules(False)},
        tuple(
            Goal(f"{step}, agent", "at most", figure, f"{step}, iptables-restore")
            for step, figure in (("apply", 2.0), ("remove", 2.0), ("apply, lock", 1.0), ("remove, lock", 1.0))
        ),
    ),
    Benchmark(
        "start", "the baseline, one queue", "",
        {"agent": _start},
        (Goal("start to READY, s", "at most", 0.2), Goal("memory, MB", "at most", 32)),
    ),
    _backend_benchmark("backends", "the baseline", _SMALL, False),
    _backend_benchmark("backends among many", "the baseline among 20,000 foreign rules", _SMALL, True),
    _backend_benchmark(
        "backends, ports", "10,000 ports in both hooks of both families",
        f'[queue.main]\n[rules.app]\nqueue = "main"\ntcp_ports = [{_PORTS}]\n', False,
    ),
)  # fmt: skip
