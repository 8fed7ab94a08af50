"""Runs a function in a forked child, for work that would have side effects in the calling process."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from nfq_agent.host.fork import fork, how_it_ended, reap

T = TypeVar("T")


class OneShotError(Exception):
    """The child ended without an answer."""


class OneShot(Generic[T]):
    """`function(*args)` running in a child process, which ends after `seconds` at most; `result` is to be called once.

    The answer is pickled. The child's standard output is discarded. Signals that stop or reload the caller do not
    reach it: it finishes what it has begun. It ends with its caller: rules must not go in after the process that wanted them
    was killed and `remove` has cleaned up. Raises OSError if it cannot be started.
    """

    def __init__(self, function: Callable[..., T], *args: Any, seconds: int = 120) -> None:
        self._name = function.__name__
        self._reader, writer = os.pipe()
        try:
            self._child = fork(lambda: _run(function, args, writer, seconds), [self._reader], ends_with_parent=True)
        except OSError:
            os.close(self._reader)
            raise
        finally:
            os.close(writer)

    def result(self) -> T:
        """Returns or raises what the function does. Raises OneShotError if the child ends without an answer."""
        with os.fdopen(self._reader, "rb") as pipe:
            data = pipe.read()
        code = reap(self._child)
        if not data or code:
            # One that was killed may have written the beginning of its answer.
            raise OneShotError(f"{self._name} ended without an answer: {how_it_ended(code or 0)}")
        good, value = pickle.loads(data)
        if good:
            return value  # type: ignore[no-any-return]  # what the function returned, by way of pickle
        raise value


def one_shot(function: Callable[..., T], *args: Any, seconds: int = 120) -> T:
    """Run `function(*args)` in a child process and wait for what it returns or raises."""
    return OneShot(function, *args, seconds=seconds).result()


def _run(function: Callable[..., Any], args: tuple[Any, ...], writer: int, seconds: int) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.alarm(seconds)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    try:
        answer: tuple[bool, Any] = (True, function(*args))
    # Every error is returned to the caller, which raises it.
    except BaseException as error:
        error.add_note(_text_of(error))
        answer = (False, error)
    try:
        data = pickle.dumps(answer)
        pickle.loads(data)
    except Exception as error:
        data = pickle.dumps((False, OneShotError(f"{answer[1]!r}\n{_text_of(error)}")))
    with contextlib.suppress(OSError), os.fdopen(writer, "wb") as pipe:
        pipe.write(data)


def _text_of(error: BaseException) -> str:
    """An error with its traceback; alone where the module for that, which only this needs, cannot be loaded now."""
    try:
        import traceback
    except (ImportError, OSError, MemoryError):
        return repr(error)
    return "".join(traceback.format_exception(error))
