"""Other files on which programs of this network namespace take the xtables lock.

The rules belong to the network namespace, the file to the mount namespace: a container with the network of the host and a /run of
its own has the host's rules and another lock. Two programs that change a table at the same time then lose a change.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from nfq_agent.host.xtables.lock import lock_path
from nfq_agent.mounts import TABLE, mounts

_PROC: Final = Path("/proc")
# The inode of the PID namespace that the kernel boots with (PROC_PID_INIT_INO, linux/proc_ns.h).
_FIRST_PIDS: Final = 0xEFFFFFFC
# A setting that only the network namespace has which the kernel boots with (net_core_table, net/core/sysctl_net_core.c).
_FIRST_NETWORK: Final = Path("/proc/sys/net/core/dev_weight")


def other_locks() -> list[str]:
    """What takes the lock on another file, as text: a process for each file, as far as this process may see that.

    A process of a container sees none of the host's: then the namespaces tell, which do not say whether a file is shared.
    """
    found = [f"{_name(pid)} (pid {pid})" for pid in _elsewhere()]
    return found or (["programs of the host"] if _is_of_a_container() else [])


def _elsewhere() -> Iterator[int]:
    """A process for each other file."""
    seen = {_file(Path(lock_path()))}
    network, mounts = _namespace("self", "net"), _namespace("self", "mnt")
    if network is None:
        return
    for pid in sorted(int(name) for name in os.listdir(_PROC) if name.isdecimal()):
        if _namespace(pid, "net") != network or _namespace(pid, "mnt") == mounts:
            continue
        file = _file(_PROC / f"{pid}/root{lock_path()}")
        if file is not None and file not in seen:
            seen.add(file)
            yield pid


def _is_of_a_container() -> bool:
    """Whether this process has the network of the host, other process ids, and a lock that is not mounted from there."""
    with suppress(OSError):
        mounted = {mount.point for mount in mounts(Path(TABLE).read_bytes())}
        return (
            _FIRST_NETWORK.exists()
            and os.stat(_PROC / "self/ns/pid").st_ino != _FIRST_PIDS
            and lock_path() not in mounted
            # Here if the whole /run is that of a host with systemd.
            and not Path("/run/systemd/system").exists()
        )
    return False


def _namespace(pid: int | str, kind: str) -> str | None:
    try:
        return os.readlink(_PROC / f"{pid}/ns/{kind}")
    except OSError:
        return None


def _file(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _name(pid: int) -> str:
    try:
        return (_PROC / f"{pid}/comm").read_bytes().decode(errors="backslashreplace").strip()
    except OSError:
        return "a process"
