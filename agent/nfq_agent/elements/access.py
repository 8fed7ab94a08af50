"""Which users may change a file or a folder: the agent reads settings and code only where other users cannot write."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from nfq_agent.mounts import TABLE, mounts

_ANYBODY: Final = stat.S_IWOTH | stat.S_IWGRP


def writable_by_others(path: Path, volume: Path | None = None) -> bool:
    """Whether a user other than root and the one that runs this may change a file or folder. Raises OSError.

    volume: a folder. What is mounted read-only there or below is not writable, regardless of its mode: the kubelet gives the
    folder of a ConfigMap the mode 0777, and protects it by its mount.
    """
    state = path.stat()
    if state.st_uid not in (0, os.geteuid()):
        return True
    return bool(state.st_mode & _ANYBODY) and not (volume is not None and _read_only(path, volume))


def open_folder(path: Path, volume: Path | None = None) -> Path | None:
    """The folder through which another user may replace this file by another one; None if there is none.

    It is the folder of the file, or of what a link leads to. In one with the sticky bit no user replaces the file of another.
    volume: as for `writable_by_others`. Raises OSError.
    """
    for folder in dict.fromkeys((path.parent, Path(os.path.realpath(path)).parent)):
        state = folder.stat()
        sticky = state.st_mode & stat.S_ISVTX and state.st_uid in (0, os.geteuid())
        if not sticky and writable_by_others(folder, volume):
            return folder
    return None


def _read_only(path: Path, volume: Path) -> bool:
    """Whether `path` is in a read-only mount whose mount point is `volume` or below it."""
    real, top = os.path.realpath(path), os.path.realpath(volume)
    found = "/", False
    for mount in mounts(Path(TABLE).read_bytes()):
        if _within(real, mount.point) and len(mount.point) >= len(found[0]):
            found = mount.point, mount.read_only
    return found[1] and _within(found[0], top)


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")
