"""`sweep`: what the unit beside the service does when the service has ended and will not come back."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Final

from nfq_agent.cli import loading, rule_verbs, show
from nfq_agent.cli.flags import Flags
from nfq_agent.service.instance_lock import living_agent

# Seconds within which a worker without a supervisor ends by itself when no packet comes any more.
_ENDS_WITHIN: Final = 2.0
# Where control groups are: cgroup v2 alone, v2 beside v1, systemd's own tree of v1.
_CGROUP_TREES: Final = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd")


def sweep(flags: Flags) -> int:
    """Remove the rules of a service that has ended, and end what is left of its processes."""
    name = loading.instance_of(flags)
    unit = "nfq-agent.service" if name == "default" else f"nfq-agent@{name}.service"
    # Listed first: a process that is started later belongs to the next agent.
    left = _processes(unit)
    if _serves(unit):
        show.wrapped(f"{unit} is active: nothing to sweep")
        return 0
    if agent := living_agent(name):
        show.wrapped(
            f"the agent of instance {name} is running ({agent}) and keeps its rules: nothing to sweep; "
            "stop it, and it removes them"
        )
        return 0
    failed = _show(unit, "Result") not in ("success", "")
    code = rule_verbs.clean(name, failed)
    if left and not _serves(unit):
        _end(left)
    return code


def _show(unit: str, what: str) -> str:
    """A property of a unit; empty where systemd does not answer."""
    try:
        return subprocess.run(
            ["systemctl", "show", "--value", f"--property={what}", unit],
            capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL, check=False,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _serves(unit: str) -> bool:
    return _show(unit, "ActiveState") in ("active", "activating", "reloading", "refreshing")


def _processes(unit: str) -> list[int]:
    """Descriptors of the processes in a unit's control group (pidfd_open(2))."""
    group = _show(unit, "ControlGroup") or f"/system.slice/{unit}"
    if "@" in unit and group == f"/system.slice/{unit}":
        group = f"/system.slice/system-nfq\\x2dagent.slice/{unit}"
    found = []
    for tree in _CGROUP_TREES:
        with contextlib.suppress(OSError):
            for pid in Path(f"{tree}{group}/cgroup.procs").read_text().split():
                with contextlib.suppress(OSError):
                    found.append(os.pidfd_open(int(pid)))
            break
    return found


def _end(processes: list[int]) -> None:
    """Give them time to end by themselves, then kill them."""
    deadline = time.monotonic() + _ENDS_WITHIN
    for each in processes:
        while time.monotonic() < deadline and not _ended(each):
            time.sleep(0.02)
    killed = 0
    for each in processes:
        if not _ended(each):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(each, signal.SIGKILL)
            killed += 1
        os.close(each)
    if killed:
        show.wrapped(f"killed {killed} processes of the service that were left")


def _ended(process: int) -> bool:
    return bool(select.select([process], [], [], 0)[0])
