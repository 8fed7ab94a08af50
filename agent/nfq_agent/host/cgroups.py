"""The control groups of this host (version 2) by their id, which is the inode number of their folder (cgroups(7))."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from nfq_agent.host.time_share import TimeShare
from nfq_agent.mounts import TABLE, mounts

# An unknown group costs a walk through all of them. Walks may take this share of the time, and this many seconds at once.
_SHARE: Final = 0.25
_AT_ONCE: Final = 1.0
_MOST: Final = 100_000


def mounted() -> Path | None:
    """Where the hierarchy is mounted; None where it is not, or where that cannot be read."""
    try:
        return _mounted()
    except OSError:
        return None


def _mounted() -> Path | None:
    found = (Path(mount.point) for mount in mounts(Path(TABLE).read_bytes()) if mount.kind == "cgroup2")
    return next(found, None)


def absence(path: str) -> str:
    """The message about a group that a rule names and that does not exist."""
    return f"the control group {path} does not exist: its unit does not run, or has another name (`systemd-cgls` shows all)"


def number(path: str) -> int | None:
    """The number of the group of this path; None where there is none, 0 where the hierarchy cannot be looked at."""
    root = _root()
    if root is None:
        return 0
    try:
        return os.stat(root / path.strip("/")).st_ino
    except FileNotFoundError:
        return None
    except OSError:
        return 0


def age(path: str) -> float:
    """Seconds since the group was made, as far as the kernel tells; 0 where there is none."""
    root = _root()
    try:
        return 0.0 if root is None else max(0.0, time.time() - os.stat(root / path.strip("/")).st_ctime)
    except OSError:
        return 0.0


def _root() -> Path | None:
    try:
        return _found_root()
    except OSError:
        # Not kept: the cause may be a lack of descriptors, which passes.
        return None


@functools.cache
def _found_root() -> Path | None:
    root = _mounted()
    return root if root is not None and (root / "cgroup.controllers").exists() else None


def all_groups() -> Iterator[tuple[int, str]]:
    """All groups of this host: number and path. None where the hierarchy cannot be looked at."""
    root = _root()
    return iter(()) if root is None else groups(str(root))


class CgroupPaths:
    """Paths by id. All are read when one is asked for that is not known."""

    def __init__(self, root: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._root = root
        self._paths: dict[int, str] = {}
        self._walks = TimeShare(_SHARE, _AT_ONCE, clock)

    def path(self, number: int) -> str | None:
        """The path below the root, as "/system.slice/ssh.service"; None where it is not known."""
        found = self._paths.get(number)
        if found is None and self._root is not None and self._walks.allows():
            with self._walks.taken():
                # Removed groups are dropped, so that a reused number is not mistaken for the old group.
                self._paths = dict(groups(str(self._root)))
            found = self._paths.get(number)
        return found


def groups(root: str) -> Iterator[tuple[int, str]]:
    """All groups below a root: number and path. What cannot be read is left out."""
    try:
        yield os.stat(root).st_ino, "/"
    except OSError:
        return
    waiting = [root]
    count = 0
    while waiting and count < _MOST:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                below = [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError:
            # It was removed meanwhile, or may not be read.
            continue
        for entry in below:
            count += 1
            waiting.append(entry.path)
            yield entry.inode(), entry.path[len(root) :]
