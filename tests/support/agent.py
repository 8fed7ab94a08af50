"""The agent as a test starts it: the real command, in a namespace, with functions to inspect it and to wait for it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from namespace import PATIENCE, Namespace

from nfq_agent.service import control
from nfq_agent.service.turn_policy import PATIENCE as TURN

COMMAND = (sys.executable, "-m", "nfq_agent")
SAVES = ("iptables-legacy-save", "ip6tables-legacy-save")
# Seconds after which a process that has slept all the while is not within a turn that waits, nor has a tap a block of its ring
# that is not handed over yet (40 ms). And seconds until a process that never sleeps so long is not waited for any more.
_RESTS = 2 * TURN + 0.02
_BUSY = 1.0


def until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """The first true value of `condition()`; fails if there is none in time."""
    deadline = time.monotonic() + seconds
    while True:
        if value := condition():
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds} s")
        time.sleep(0.02)


class Agent:
    """`nfq-agent run` in a namespace. `log` is its standard error so far."""

    def __init__(
        self, namespace: Namespace, folder: Path, config: str = "", *flags: str, instance: str = "default", **environment: str
    ):
        self.namespace = namespace
        self.instance = instance
        self.config = folder / f"{instance}.toml"
        self._flags = flags
        self._environment = {"LOG_FORMAT": "console", **environment}
        self._output = folder / f"{instance}.log"
        if config:
            self.configure(config)
        self.start()

    def configure(self, text: str) -> None:
        """Write the configuration again. The running agent does not see it before `reload`, and never a part of it."""
        head = f'[agent]\ninstance = "{self.instance}"\n' if self.instance != "default" and "[agent]" not in text else ""
        whole = self.config.with_suffix(".new")
        whole.write_text(head + text)
        whole.replace(self.config)

    def start(self) -> None:
        """Start it; `ready` waits until it serves."""
        argv = ["env", *(f"{name}={value}" for name, value in self._environment.items()), *COMMAND, "run", *self._flags]
        if self.config.exists():
            argv += ["--config", str(self.config)]
        with self._output.open("ab") as stream:
            self._begin = stream.tell()
            self.process: subprocess.Popen[Any] = self.namespace.start(*argv, stdout=stream, stderr=stream)

    @property
    def log(self) -> str:
        """What it has logged since it was last started; while it runs, the lines that are whole."""
        runs = self.process.poll() is None
        with self._output.open("rb") as output:
            output.seek(self._begin)
            text = output.read()
        return (text[: text.rfind(b"\n") + 1] if runs else text).decode(errors="replace")

    def ready(self) -> Agent:
        """Wait until it serves; fails with its log if it ends instead."""

        def serving() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(f"the agent ended with {self.process.returncode}:\n{self.log}")
            return "is serving" in self.log

        until(serving, "the agent gets ready")
        return self

    def stop(self) -> int:
        """Stop it in the orderly way; its exit code."""
        self.process.terminate()
        return int(self.process.wait(timeout=PATIENCE))

    def kill(self) -> None:
        """End the main process as `kill -9` does."""
        self.process.kill()
        self.process.wait(timeout=PATIENCE)

    def verb(self, *argv: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """Another verb of the command, for this agent's configuration."""
        extra = ["--config", str(self.config)] if self.config.exists() else []
        return self.namespace.run(*COMMAND, argv[0], *extra, *argv[1:], check=check, **options)

    def rest(self) -> None:
        """Wait until all that has come is counted: a worker counts at the end of a turn, and sleeps then for longer.

        A worker that is never without packets is not waited for.
        """
        deadline = time.monotonic() + _BUSY
        before, now = None, self._sleepers()
        while (None in now or now != before) and time.monotonic() < deadline:
            time.sleep(_RESTS)
            before, now = now, self._sleepers()

    def _sleepers(self) -> list[str | None]:
        """How often each of its processes has fallen asleep; None for one that is awake."""
        try:
            pids = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        except OSError:
            return []
        return [asleep(int(pid)) for pid in pids]

    def status(self) -> dict[str, Any]:
        """`status --json`, once it rests."""
        self.rest()
        value: dict[str, Any] = json.loads(self.verb("status", "--json").stdout)
        return value

    def answer(self) -> dict[str, Any]:
        """The same, asked without starting a command."""
        self.rest()
        value: dict[str, Any] = self.namespace.call(control.ask, self.instance, {"verb": "status"}, 30.0)
        return value

    def queue(self, name: str = "main") -> dict[str, Any]:
        """One queue of the status."""
        (found,) = [queue for queue in self.status()["queues"] if queue["name"] == name]
        return dict(found)

    def totals(self, name: str = "main") -> dict[str, int]:
        """A queue's counters, summed over its workers."""
        workers = self.queue(name)["workers"]
        return {key: sum(worker[key] or 0 for worker in workers) for key in workers[0] if isinstance(workers[0][key], int)}

    def workers(self) -> list[int]:
        """The pids of its workers."""
        return [worker["pid"] for queue in self.status()["queues"] for worker in queue["workers"]]


def asleep(process: int) -> str | None:
    """How often a process has fallen asleep, or None if it is awake (proc_pid_status(5)). A stopped one does not wake either."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return "ended"
    (state,) = re.findall(r"^State:\s+(\w)", text, re.MULTILINE)
    (slept,) = re.findall(r"^voluntary_ctxt_switches:\s+(\d+)", text, re.MULTILINE)
    return str(slept) if state != "R" else None


def suspend(process: int) -> None:
    """Stop a process by a signal, and wait until it has stopped: what it was doing is done."""
    os.kill(process, signal.SIGSTOP)
    until(lambda: is_stopped(process), "the process has stopped")


def is_stopped(process: int) -> bool:
    """Whether a process is stopped by a signal (proc_pid_stat(5))."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"


class Started(Agent):
    """An agent behind another command."""

    def __init__(self, namespace: Namespace, folder: Path, text: str, before: Sequence[str]) -> None:
        self._before = before
        super().__init__(namespace, folder, text)

    def start(self) -> None:
        start = self.namespace.start
        self.namespace.start = lambda *argv, **options: start(*self._before, *argv, **options)  # type: ignore[method-assign]  # for this one
        try:
            super().start()
        finally:
            self.namespace.start = start  # type: ignore[method-assign]  # as it was


def saved(namespace: Namespace, counters: bool = False) -> str:
    """All legacy rules of both families; without the counters of chains and the comments, unless `counters`."""
    text = "".join(namespace.run(command, *(["-c"] if counters else [])).stdout for command in SAVES)
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    if not counters:
        lines = [re.sub(r" \[\d+:\d+\]$", "", line) for line in lines]
    return "\n".join(lines)


def ours(namespace: Namespace) -> list[str]:
    """The rules and chains of any instance of ours."""
    return [line for line in saved(namespace).splitlines() if "NFQA-" in line or "nfq-agent:" in line]
