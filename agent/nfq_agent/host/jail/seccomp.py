"""Loads a seccomp filter into this process, all of its threads and what they start; it cannot be removed (seccomp(2))."""

from __future__ import annotations

import ctypes
import os
from typing import Final

from nfq_agent.host.jail.syscalls import this_architecture

_SET_MODE_FILTER: Final = 1
_GET_ACTION_AVAIL: Final = 2
# All threads get it, or none does.
_TSYNC: Final = 1
_RET_ERRNO: Final = 0x00050000
_PR_SET_NO_NEW_PRIVS: Final = 38
_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    # struct sock_fprog (linux/filter.h)
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def missing() -> str | None:
    """What this host lacks for a filter, in words; None if nothing."""
    architecture = this_architecture()
    if architecture is None:
        return f"seccomp: the system calls of {os.uname().machine} are not known here"
    action = ctypes.c_uint32(_RET_ERRNO)
    if _libc.syscall(architecture.numbers["seccomp"], _GET_ACTION_AVAIL, 0, ctypes.byref(action)) != 0:
        return f"seccomp: {os.strerror(ctypes.get_errno())} (CONFIG_SECCOMP_FILTER)"
    return None


def no_new_privileges() -> None:
    """Forbid programs that this process runs to gain more rights. Without it neither a filter nor Landlock is accepted."""
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")


def load(instructions: bytes) -> None:
    """Put a filter into force. Raises OSError."""
    architecture = this_architecture()
    assert architecture is not None
    program = _Program(len(instructions) // 8, instructions)
    found = _libc.syscall(architecture.numbers["seccomp"], _SET_MODE_FILTER, _TSYNC, ctypes.byref(program))
    if found > 0:
        raise OSError(f"seccomp: thread {found} has a filter of its own")
    if found < 0:
        raise OSError(ctypes.get_errno(), f"seccomp: {os.strerror(ctypes.get_errno())}")
