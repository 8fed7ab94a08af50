"""A function run in a forked child of its own, for what would leave its traces in the process that called it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import pickle
import signal
import traceback
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

T = TypeVar("T")
_PR_SET_PDEATHSIG: Final = 1
_libc = ctypes.CDLL(None)
_HELD_OFF: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD)


class ErrandError(Exception):
    """The child ended without an answer."""


class Errand(Generic[T]):
    """`function(*args)` under way in a child process, which is ended after `seconds`; `result` is to be called once.

    The answer comes back pickled. The child's standard output goes nowhere. Signals that stop or reload the caller do not
    reach it: what it has begun, it finishes. It dies with a caller that is killed: rules must not go in when whoever asked
    for them is gone, and `remove` has been by. Raises OSError if it can't be started.
    """

    def __init__(self, function: Callable[..., T], *args: Any, seconds: int = 120) -> None:
        self._name = function.__name__
        self._reader, writer = os.pipe()
        # Blocked over the fork: a Python handler, or the wake-up descriptor, must not be served by the child.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_OFF)
        caller = os.getpid()
        gc.freeze()
        try:
            self._child = os.fork()
            if self._child == 0:
                os.close(self._reader)
                _child(function, args, writer, seconds, caller)
        except OSError:
            os.close(self._reader)
            raise
        finally:
            os.close(writer)
            gc.unfreeze()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def result(self) -> T:
        """What it returns or raises. Raises ErrandError if the child ends without an answer."""
        with os.fdopen(self._reader, "rb") as pipe:
            data = pipe.read()
        _, status = os.waitpid(self._child, 0)
        if not data:
            code = os.waitstatus_to_exitcode(status)
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise ErrandError(f"{self._name} ended without an answer: {how}")
        good, value = pickle.loads(data)
        if good:
            return value  # type: ignore[no-any-return]  # what the function returned, by way of pickle
        raise value


def errand(function: Callable[..., T], *args: Any, seconds: int = 120) -> T:
    """The same, waited for."""
    return Errand(function, *args, seconds=seconds).result()


def _child(function: Callable[..., Any], args: tuple[Any, ...], writer: int, seconds: int, caller: int) -> None:
    try:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != caller:
            return
        signal.set_wakeup_fd(-1)
        for number in _HELD_OFF:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGCHLD else signal.SIG_IGN)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*_HELD_OFF, signal.SIGALRM})
        signal.alarm(seconds)
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, 1)
        try:
            answer: tuple[bool, Any] = (True, function(*args))
        # Every error goes back to the caller, who raises it.
        except BaseException as error:
            error.add_note(traceback.format_exc())
            answer = (False, error)
        try:
            data = pickle.dumps(answer)
            pickle.loads(data)
        except Exception:
            data = pickle.dumps((False, ErrandError(f"{answer[1]!r}\n{traceback.format_exc()}")))
        with contextlib.suppress(OSError), os.fdopen(writer, "wb") as pipe:
            pipe.write(data)
    finally:
        # Not sys.exit: the parent's clean-up is not the child's to run.
        os._exit(0)
