"""Shows that a worker makes progress: a number in memory shared with the supervisor, and a timer that ends a worker that hangs.

The timer sends SIGKILL (timer_create(2)): no code in the process can catch, block or ignore it, even if the interpreter is
blocked. So a worker that hangs does not keep its queue when the supervisor is gone too.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable
from typing import Final

from nfq_agent.counters import Slots

# Seconds without a beat after which the kernel ends the process.
ENDS_AFTER: Final = 10.0
_CLOCK_MONOTONIC: Final = 1
_SIGEV_SIGNAL: Final = 0
_libc = ctypes.CDLL(None, use_errno=True)


class _SigEvent(ctypes.Structure):
    # struct sigevent is 64 bytes (sigevent(7), asm-generic/siginfo.h).
    _fields_ = (("value", ctypes.c_void_p), ("signal", ctypes.c_int), ("notify", ctypes.c_int), ("rest", ctypes.c_char * 48))


class _TimerSpec(ctypes.Structure):
    _fields_ = (("interval", ctypes.c_long * 2), ("value", ctypes.c_long * 2))


class DeadlineTimer:
    """Ends this process with SIGKILL unless it is set again in time. Raises OSError if the process may not have timers."""

    def __init__(self, seconds: float) -> None:
        event = _SigEvent(None, signal.SIGKILL, _SIGEV_SIGNAL)
        self._timer = ctypes.c_void_p()
        if _libc.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer)) != 0:
            raise OSError(ctypes.get_errno(), "timer_create")
        whole = int(seconds)
        self._spec = _TimerSpec((0, 0), (whole, int((seconds - whole) * 1e9)))
        self.set()

    def set(self) -> None:
        """Restart the timer."""
        _libc.timer_settime(self._timer, 0, ctypes.byref(self._spec), None)


class Pulse:
    """Made before the fork. The child, and processes that it forks, call `beat` at least once a second."""

    def __init__(self, ends_after: float = ENDS_AFTER) -> None:
        """ends_after: seconds without a beat after which a process that has once called `beat` is ended."""
        self._slots = Slots(("beats",))
        self._ends_after = ends_after
        self._pid = 0
        self._timer: DeadlineTimer | None = None

    @property
    def beats(self) -> int:
        """How often `beat` was called so far, by all processes."""
        return self._slots.snapshot()["beats"]

    def beat(self) -> None:
        """Show that this process makes progress."""
        self._slots.set("beats", self.beats + 1)
        if self._pid != os.getpid():
            # A timer does not survive fork(2): each process has its own.
            self._pid, self._timer = os.getpid(), None
            with contextlib.suppress(OSError):
                self._timer = DeadlineTimer(self._ends_after)
        elif self._timer is not None:
            self._timer.set()


def waited_for_cpu(pid: int) -> float:
    """Seconds that a process was ready to run and had no CPU (/proc/PID/schedstat); 0 where the kernel does not count that."""
    try:
        with open(f"/proc/{pid}/schedstat") as schedstat:
            return int(schedstat.read().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


class Progress:
    """For how long a process has made no progress, without the time that it waited for a CPU."""

    def __init__(self, waited: Callable[[int], float] = waited_for_cpu) -> None:
        self._read_waited = waited
        self._beats: int | None = None
        self._since = 0.0
        self._waited = 0.0

    def restart(self) -> None:
        """Count from the next call of `stuck_for` on."""
        self._beats = None

    def stuck_for(self, beats: int, pid: int, now: float) -> float:
        """Seconds since `beats` changed, less those that the process waited for a CPU. now: monotonic seconds."""
        waited = self._read_waited(pid)
        if beats != self._beats:
            self._beats, self._since, self._waited = beats, now, waited
        return max(0.0, now - self._since - (waited - self._waited))
