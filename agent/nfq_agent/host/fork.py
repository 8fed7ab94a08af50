"""Forks a child process that runs one function and ends: the only way in which the agent makes a process of its own code."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_libc = ctypes.CDLL(None)
# Signals that stop or reload the parent are ignored by a child: it ends when it is told to, and finishes what it has begun.
_IGNORED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE)
_BLOCKED: Final = (*_IGNORED, signal.SIGCHLD)


def fork(life: Callable[[], int | None], close: Iterable[int] = (), *, ends_with_parent: bool = False) -> int:
    """Fork a child that calls `life` and exits with what it returns (None is 0). Returns the child's pid.

    If `life` raises, the child prints the traceback to standard error and exits with 1. The child ignores the signals that
    stop or reload the parent. close: descriptors of the parent that the child must not keep open. ends_with_parent: the kernel
    kills the child (SIGKILL) when the thread that forked it ends (PR_SET_PDEATHSIG of prctl(2)). Raises OSError.
    """
    close = list(close)
    sys.stdout.flush()
    sys.stderr.flush()
    # Blocked until the child has its own handlers: it must not run a handler of the parent, nor write to its wake-up descriptor.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
    parent = os.getpid()
    try:
        pid = os.fork()
        if pid == 0:
            _live(life, close, before, parent if ends_with_parent else None)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


def _live(life: Callable[[], int | None], close: list[int], mask: set[int | signal.Signals], parent: int | None) -> None:
    """Run the child. Never returns."""
    code = 1
    # Its garbage collector must not touch the parent's objects: each page that it writes to is copied.
    gc.freeze()
    try:
        if parent is not None:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:
                return
        signal.set_wakeup_fd(-1)
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for descriptor in close:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        code = life() or 0
    except BaseException as error:
        # The interpreter's own way to print it: the module `traceback`, and what it needs, is not loaded for this.
        sys.__excepthook__(type(error), error, error.__traceback__)
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        # Not sys.exit: the child must not run the parent's clean-up.
        os._exit(code)


def reap(pid: int, block: bool = True) -> int | None:
    """The exit code of an ended child, or minus the signal that ended it; None if it still runs (only without `block`)."""
    found, status = os.waitpid(pid, 0 if block else os.WNOHANG)
    return None if found == 0 else os.waitstatus_to_exitcode(status)


def how_it_ended(code: int) -> str:
    """An exit code as text: `exit code 1`, `SIGKILL`."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
