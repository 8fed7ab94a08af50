"""Landlock: which files this process may still read and write from now on (landlock(7), linux/landlock.h)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import struct
from collections.abc import Iterable
from typing import Final

from nfq_agent.host.jail.syscalls import this_architecture

_CREATE_VERSION: Final = 1
_PATH_BENEATH: Final = 1
# LANDLOCK_ACCESS_FS_*: each is one bit, and from one version of the kernel's interface on.
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_DIR, _REMOVE_FILE = (1 << bit for bit in range(6))
_MAKE_REG: Final = 1 << 8
_ALL_OF: Final = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
_TRUNCATE: Final = 1 << 14
# LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET and LANDLOCK_SCOPE_SIGNAL
_SCOPES_SINCE: Final = 6
_SCOPES: Final = 3
_READS: Final = _READ_FILE | _READ_DIR
_WRITES: Final = _READS | _WRITE_FILE | _REMOVE_FILE | _MAKE_REG | _TRUNCATE
_FOR_FILES: Final = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
_libc = ctypes.CDLL(None, use_errno=True)


def version() -> int:
    """The version of the kernel's interface; 0 where it has none, or it is switched off."""
    return max(0, _call("landlock_create_ruleset", None, 0, _CREATE_VERSION))


def missing() -> str | None:
    """What this host lacks, in words; None if nothing."""
    if this_architecture() is None:
        return f"Landlock: the system calls of {os.uname().machine} are not known here"
    if version() == 0:
        return f"Landlock: {os.strerror(ctypes.get_errno())} (CONFIG_SECURITY_LANDLOCK, and `landlock` in lsm=)"
    return None


def restrict(reads: Iterable[str], writes: Iterable[str]) -> None:
    """From now on this thread opens, makes and removes files beneath these paths alone. Raises OSError.

    reads, writes: files or folders; what this user cannot reach is left out. What is open already stays usable.
    """
    found = version()
    every = sum(bits for since, bits in _ALL_OF.items() if since <= found)
    attribute = struct.pack("=QQQ", every, 0, _SCOPES if found >= _SCOPES_SINCE else 0)
    # A kernel takes a structure that is longer than its own if the rest is 0.
    ruleset = _checked("landlock_create_ruleset", attribute, len(attribute), 0)
    try:
        for paths, access in ((reads, _READS), (writes, _WRITES)):
            for path in paths:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                    _allow(ruleset, path, access & every)
        _checked("landlock_restrict_self", ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, access: int) -> None:
    beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(beneath).st_mode):
            access &= _FOR_FILES
        _checked("landlock_add_rule", ruleset, _PATH_BENEATH, struct.pack("=Qi", access, beneath), 0)
    finally:
        os.close(beneath)


def _checked(name: str, *arguments: object) -> int:
    found = _call(name, *arguments)
    if found < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return found


def _call(name: str, *arguments: object) -> int:
    architecture = this_architecture()
    if architecture is None:
        return -1
    return int(_libc.syscall(architecture.numbers[name], *arguments))
