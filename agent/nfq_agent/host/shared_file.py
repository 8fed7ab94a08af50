"""Memory that processes share and that outlives them all until the next boot: a file in the agent's folder in /run."""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path


def shared_memory(path: Path, size: int) -> mmap.mmap:
    """Map a file of `size` bytes; one of another size, or that is not the agent's own, is replaced by a file of zeroes.

    All of it is allocated now: a page without memory behind it would kill the process that touches it. Raises OSError.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        file = os.open(path, flags)
    except OSError:
        file = -1
    try:
        if file >= 0 and not _usable(os.fstat(file), size):
            os.close(file)
            file = -1
        if file < 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            file = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.posix_fallocate(file, 0, size)
            except OSError:
                path.unlink()
                raise
        return mmap.mmap(file, size)
    finally:
        if file >= 0:
            os.close(file)


def _usable(state: os.stat_result, size: int) -> bool:
    return (
        stat.S_ISREG(state.st_mode)
        and state.st_size == size
        and state.st_uid == os.geteuid()
        and not state.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
        and state.st_nlink == 1
    )
