"""The bed of a benchmark: namespaces, the agent or a peer in them, and the load, each on its own processor."""

from __future__ import annotations

import json
import os
import re
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, Self

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parent.parent
BUILT: Final = HERE / "results" / "built"
AGENT: Final = ROOT / ".venv" / "bin" / "nfq-agent"
sys.path.insert(0, str(HERE.parent / "support"))

from namespace import Namespace, join  # noqa: E402  # found by the line above

from nfq_agent.host.nfqueue.statistics import QueueStatistics, statistics  # noqa: E402  # it belongs to the imports

# Bytes of each packet that the agent copies where it reads no more than headers; the peers get as many.
COPIED: Final = 128
MAX_LEN: Final = 4096
QUEUE: Final = 100
_READY_WITHIN: Final = 20.0


class BenchError(Exception):
    """A measurement that cannot be had."""


class Bed:
    """Two namespaces, 10.203.0.1 here and 10.203.0.2 there, with a veth pair of MTU 1500; everything in them ends with it."""

    def __init__(self) -> None:
        self.here = Namespace()
        self.there = Namespace()
        join(self.here, self.there)
        self.folder = Path(tempfile.mkdtemp(prefix="nfq-agent-bench-"))
        for side in (self.here, self.there):
            side.shell("sysctl -qw net.ipv4.ip_local_port_range='1024 65000' net.ipv4.tcp_max_tw_buckets=1000000")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.here.close()
        self.there.close()
        for path in self.folder.iterdir():
            path.unlink()
        self.folder.rmdir()

    def agent(self, config: str, core: int | None = None) -> Agent:
        """The agent with this configuration, serving."""
        return Agent(self, config, core)

    def peer(self, *argv: str | Path, core: int | None = None, side: Namespace | None = None) -> subprocess.Popen[str]:
        """A program that says `ready` when it is."""
        process = (side or self.here).start(*_pinned(core), *map(str, argv), stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], _READY_WITHIN)[0] or process.stdout.readline() != "ready\n":
            raise BenchError(f"{argv[0]} did not become ready")
        return process

    def load(self, *argv: object, core: int | None = None, side: Namespace | None = None) -> list[float]:
        """Run a load to its end, here unless said otherwise; what it prints."""
        done = (side or self.here).run(*_pinned(core), str(BUILT / "load"), *map(str, argv), timeout=60)
        return [float(word) for word in done.stdout.split()]

    def begin(self, *argv: object, core: int | None = None, side: Namespace | None = None) -> subprocess.Popen[str]:
        """Start a load, here unless said otherwise."""
        return (side or self.here).start(*_pinned(core), str(BUILT / "load"), *map(str, argv), stdout=subprocess.PIPE, text=True)

    def serve(self, kind: str, port: int, core: int | None = None, side: Namespace | None = None) -> None:
        """Start a TCP server of the load's, there unless said otherwise."""
        self.peer(BUILT / "load", "serve", kind, str(port), core=core, side=side or self.there)

    def bulk(self, port: int, seconds: float) -> float:
        """Bits a second of one stream from here to there, by iperf3, as its receiver counts them."""
        server = self.there.start("iperf3", "-s", "-1", "-p", str(port), "--forceflush", stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        while "listening" not in server.stdout.readline():
            if server.poll() is not None:
                raise BenchError("iperf3 does not serve")
        done = self.here.run("iperf3", "-J", "-c", "10.203.0.2", "-p", str(port), "-t", str(seconds))
        return float(json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"])

    def link_address(self) -> bytes:
        """The link-layer address of the end here."""
        shown = self.here.shell("ip -o link show eth0").split("link/ether ")[1].split()[0]
        return bytes.fromhex(shown.replace(":", ""))

    def queues(self) -> list[QueueStatistics]:
        """The kernel's figures of each queue here."""
        return list(statistics(self.here.pid).values())

    def judged(self) -> int:
        """Packets that got into a queue and to its socket so far."""
        return sum(queue.id_sequence - queue.user_dropped for queue in self.queues())


def spent(pids: Iterable[int]) -> float:
    """Seconds of processor time that the threads of these processes have taken (schedstat, proc_pid(5): nanoseconds)."""
    threads = [path for pid in pids for path in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return sum(int(path.read_text().split()[0]) for path in threads) / 1e9


def _pinned(core: int | None) -> list[str]:
    return [] if core is None else ["taskset", "-c", str(core)]


class Agent:
    """`nfq-agent run`, as a service manager starts it. started: seconds until it said that it is ready."""

    def __init__(self, bed: Bed, config: str, core: int | None = None) -> None:
        path = bed.folder / "agent.toml"
        path.write_text(config)
        notify = bed.folder / "notify"
        notify.unlink(missing_ok=True)
        self._log = bed.folder / "agent.log"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener, self._log.open("wb") as log:
            listener.bind(str(notify))
            environment = {**os.environ, "NOTIFY_SOCKET": str(notify), "LOG_FORMAT": "console"}
            begin = time.monotonic()
            self.process: subprocess.Popen[Any] = bed.here.start(
                *_pinned(core), str(AGENT), "run", "--config", str(path), stdout=log, stderr=log, env=environment
            )
            listener.settimeout(0.5)
            while True:
                try:
                    ready = b"READY=1" in listener.recv(4096)
                except TimeoutError:
                    ready = False
                self.started = time.monotonic() - begin
                if ready:
                    break
                if self.process.poll() is not None or self.started > _READY_WITHIN:
                    raise BenchError(f"the agent did not become ready:\n{self.log}")

    @property
    def log(self) -> str:
        """What it has said."""
        return self._log.read_text()

    def family(self) -> list[int]:
        """Its process and its workers."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid, *map(int, children)]

    def pin_workers(self) -> None:
        """Give each worker a processor of its own, in their order."""
        for core, pid in enumerate(self.family()[1:]):
            os.sched_setaffinity(pid, {core})

    def worker_seconds(self) -> float:
        """Seconds of processor time that its workers have taken."""
        return spent(self.family()[1:])

    def memory(self) -> int:
        """Bytes of memory, each page that is shared counted in parts (PSS, proc_pid_smaps(5))."""
        rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in self.family()]
        return sum(int(match[1]) * 1024 for text in rollups if (match := re.search(r"^Pss: +(\d+) kB", text, re.M)))

    def stop(self) -> None:
        """Stop it in the orderly way."""
        self.process.terminate()
        if self.process.wait(timeout=20) != 0:
            raise BenchError(f"the agent ended with {self.process.returncode}:\n{self.log}")
