"""Runs systemd-nspawn where no systemd runs: each container in a control group of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

PREFIX = "nfq-agent-test-"
# How long a test waits for what has to come, in seconds. It only bounds a test that fails: on a loaded machine all takes long.
PATIENCE = 120.0


ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
}


def checked(command: Sequence[str], timeout: float = 900, **options: Any) -> str:
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL, **options
    )
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.stdout


def nspawn(root: Path) -> list[str]:
    # Without --register and with --keep-unit no running systemd is needed on this machine. The machine's name is that of a
    # folder under /run/systemd/nspawn, so no two may have the same.
    words = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--resolv-conf=off", "--hostname=testhost"]
    return [*words, f"--machine={PREFIX}{os.getpid()}-{time.monotonic_ns()}", f"--directory={root}"]


def setenv() -> list[str]:
    return [f"--setenv={name}={value}" for name, value in ENVIRONMENT.items()]


@contextlib.contextmanager
def control_group() -> Iterator[list[str]]:
    """A control group of its own, as the words that enter it. Two containers in one group collide."""
    name = f"{PREFIX}{os.getpid()}-{time.monotonic_ns()}"
    groups = [tree / name for tree in trees()]
    for group in groups:
        group.mkdir()
    try:
        script = "".join(f"echo $$ >{group}/cgroup.procs; " for group in groups)
        # The container ends with this process: systemd-nspawn does the same with its own children.
        yield [
            "setpriv",
            "--pdeathsig=KILL",
            "env",
            "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1",
            "sh",
            "-ec",
            f'{script}exec "$@"',
            "sh",
        ]
    finally:
        for group in groups:
            for folder, _, _ in os.walk(group, topdown=False):
                # A process that is just ending keeps its group busy for a moment.
                until(partial(remove_group, folder), f"{folder} empty")


def remove_group(folder: str) -> bool:
    try:
        os.rmdir(folder)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """What `condition` returns as soon as it is true; an AssertionError that says `what` did not come in time."""
    deadline = time.monotonic() + seconds
    while True:
        if found := condition():
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.05)


def trees() -> list[Path]:
    """Where control groups are made: the unified tree, and beside it systemd's own where the machine is a hybrid."""
    trees = [path for path in map(Path, ("/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd")) if path.is_dir()]
    return trees or [Path("/sys/fs/cgroup")]
