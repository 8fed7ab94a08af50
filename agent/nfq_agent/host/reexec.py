"""Starts this program again in place: the same process with the code that is on the disk now, and descriptors that it is given.

Their names and numbers go through an environment variable, so that versions can differ.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NoReturn

_VARIABLE: Final = "NFQ_AGENT_HANDED"
# Seconds that a rehearsal may take, and between two beats meanwhile. It needs half a second of CPU: a busy host takes long.
_REHEARSAL: Final = 60.0
_BEAT: Final = 1.0
# `handed` removes the variable.
_started_again: Final = _VARIABLE in os.environ
# Blocked until the new program has its handlers: before that they would end it.
_WAIT: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)


def command() -> list[str]:
    """The command line of this process, as it can be run again."""
    return [sys.executable, *sys.orig_argv[1:]]


class Code:
    """The code of this program as it was when it was started."""

    def __init__(self, folder: Path | None = None) -> None:
        """folder: where it is; else that of this package."""
        self._folder = Path(__file__).parent.parent if folder is None else folder
        self._seen = self._look()

    @property
    def changed(self) -> bool:
        """Whether one of its files was replaced, as after an upgrade of the package."""
        return self._look() != self._seen

    def _look(self) -> dict[str, tuple[int, int, int]]:
        found = {}
        for folder, _, names in os.walk(self._folder):
            for name in names:
                if name.endswith((".py", ".so")):
                    with contextlib.suppress(OSError):
                        state = os.stat(f"{folder}/{name}")
                        found[f"{folder}/{name}"] = state.st_ino, state.st_mtime_ns, state.st_size
        return found


def rehearse(beat: Callable[[], None]) -> str:
    """Why the code that is on the disk now would not start with its configuration; empty if it would.

    A separate process loads all of its code and checks its configuration. beat: called each second until it has ended.
    """
    argv = command()
    place = argv.index("run")
    argv[place : place + 1] = ["check", "--code"]
    shown = " ".join(argv)
    until = time.monotonic() + _REHEARSAL
    try:
        # Loaded only here. It takes descriptors, of which none may be left.
        import subprocess

        pipe = subprocess.PIPE
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, errors="replace") as process:
            while True:
                try:
                    said, faults = process.communicate(timeout=_BEAT)
                    break
                except subprocess.TimeoutExpired:
                    if time.monotonic() < until:
                        beat()
                        continue
                    process.kill()
                    return (
                        f"the check of its code and its configuration has not ended within {_REHEARSAL:g} s; try again when "
                        f"this host is less busy, or run `{shown}` to see what it waits for"
                    )
    except (OSError, ImportError) as error:
        return str(error)
    if process.returncode == 0:
        return ""
    return (faults or said).strip() or f"`{shown}` ended with {process.returncode}"


def start_again(handed: Mapping[str, int]) -> NoReturn:
    """Run the program again in this process. handed: descriptors by name, which have no `=` and no space. Raises OSError."""
    for descriptor in handed.values():
        os.set_inheritable(descriptor, True)
    os.environ[_VARIABLE] = " ".join(f"{name}={descriptor}" for name, descriptor in handed.items())
    sys.stdout.flush()
    sys.stderr.flush()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _WAIT)
    try:
        os.execv(sys.executable, command())
    except OSError:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        del os.environ[_VARIABLE]
        for descriptor in handed.values():
            os.set_inheritable(descriptor, False)
        raise


def was_started_again() -> bool:
    """Whether `start_again` began this program."""
    return _started_again


def handed() -> dict[str, int]:
    """What the previous program passed to this one; a second call returns nothing."""
    found = {}
    for each in os.environ.pop(_VARIABLE, "").split():
        name, _, number = each.partition("=")
        try:
            os.set_inheritable(int(number), False)
        except (OSError, ValueError):
            continue
        found[name] = int(number)
    return found


def take_signals() -> None:
    """Unblock the signals that waited while the program was started. Call it when their handlers are set."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _WAIT)
