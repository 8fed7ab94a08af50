"""The lock that every user of legacy xtables takes: flock(2) on /run/xtables.lock, as `iptables -w` does (iptables(8))."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from nfq_agent.rules.model import RuleError

DEFAULT_PATH: Final = "/run/xtables.lock"
DEADLINE: Final = 10.0
_PERMISSION: Final = "run as root, or let the agent's user read it (tmpfiles.d: f {path} 0640 root proxyuser)"
_REMEDIES: Final = {
    errno.EISDIR: "remove that directory: iptables and this agent take a lock on a file of that name",
    errno.EROFS: 'mount a writable file system there, name another file in XTABLES_LOCKFILE, or set backend = "owned"',
    errno.ENOSPC: "free some space there",
    errno.EMFILE: "raise LimitNOFILE= of the unit (ulimit -n)",
    errno.ENOENT: "make its folder, or name another file in XTABLES_LOCKFILE",
    errno.ENXIO: "remove that socket: iptables and this agent take a lock on a file of that name",
}


class LockError(RuleError):
    """The lock was not free in time; nothing was written."""


def lock_path() -> str:
    """Where the lock is: XTABLES_LOCKFILE in the environment wins, as it does for iptables."""
    return os.environ.get("XTABLES_LOCKFILE") or DEFAULT_PATH


def open_lock(create: bool = True) -> int:
    """A descriptor of the lock, made 0600 where it is missing, as iptables makes it, unless `create` is false. Raises RuleError.

    Reading is enough for flock(2); so a mode that lets the agent's group read it is enough for an agent that is not root.
    """
    path = lock_path()
    try:
        # A FIFO would keep this process waiting for a writer.
        lock = os.open(path, os.O_RDONLY | (os.O_CREAT if create else 0) | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, _PERMISSION).format(path=path)
        raise RuleError(f"the xtables lock {path} cannot be opened: {error.strerror}; {remedy}") from error
    kind = os.fstat(lock).st_mode
    if not stat.S_ISREG(kind) and not stat.S_ISCHR(kind):
        os.close(lock)
        raise RuleError(f"the xtables lock {path} is not a regular file; remove it: iptables takes a lock on a file of that name")
    return lock


@contextlib.contextmanager
def xtables_lock(descriptor: int | None = None, seconds: float = DEADLINE) -> Iterator[None]:
    """Hold the lock. descriptor: of the lock, opened by a process that may. Raises RuleError if it is not free in time."""
    lock = open_lock() if descriptor is None else descriptor
    try:
        _take(lock, seconds)
        try:
            yield
        finally:
            # Unlock explicitly: an inherited descriptor would keep the lock.
            release(lock)
    finally:
        if descriptor is None:
            os.close(lock)


def release(descriptor: int) -> None:
    """Release the lock, whichever process took it on this descriptor."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)


def _take(lock: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    pause = 0.001
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EINTR):
                raise RuleError(f"the xtables lock {lock_path()} cannot be taken: {error.strerror}") from error
        else:
            return
        if time.monotonic() >= deadline:
            raise LockError(f"the xtables lock {lock_path()} was not free within {seconds:g} s: {held_by(lock)}")
        time.sleep(pause * (0.5 + os.urandom(1)[0] / 255))
        # Short: programs that wait in the kernel's queue for the lock get it first every time.
        pause = min(pause * 1.5, 0.003)


def holders(lock: int) -> list[int]:
    """The processes that hold the lock, from /proc/locks (proc_locks(5)); none where that cannot be read."""
    found = os.fstat(lock)
    inode = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return []
    words = [line.split() for line in lines]
    return [int(each[4]) for each in words if len(each) > 5 and each[1] == "FLOCK" and each[5] == inode and int(each[4]) > 0]


def held_by(lock: int) -> str:
    """The processes that hold the lock, as text."""
    names = []
    for pid in holders(lock):
        try:
            name = Path(f"/proc/{pid}/comm").read_text().strip()
        except OSError:
            name = "a process"
        names.append(f"{name} (pid {pid})")
    return f"held by {', '.join(names)}" if names else "held by another process, which is not visible here (fuser -v)"
