"""Stops every process of a tree at each system call that may change something, and kills one there: before the call is done.

A seccomp filter with a listener (seccomp_unotify(2)) is put into the first process; forked and executed programs have it too. The
call waits until this program lets it continue, so that a death comes at the same step each time.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import signal
import struct
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from nfq_agent.host.jail.assembler import ALLOW
from nfq_agent.host.jail.syscalls import this_architecture

# What may change the host, or what other processes see. Those that a machine does not have are left out.
_CALLS: Final = (
    "bind", "bpf", "clone", "clone3", "connect", "epoll_ctl", "execve", "exit_group", "flock", "fork", "ftruncate",
    "ioctl", "kill", "landlock_restrict_self", "listen", "mkdir", "mkdirat", "pidfd_send_signal", "prctl", "pwrite64",
    "rename", "renameat", "renameat2", "rmdir", "seccomp", "sendmsg", "sendto", "setsockopt", "socket", "socketpair",
    "splice", "timer_create", "unlink", "unlinkat", "vfork",
)  # fmt: skip
# linux/seccomp.h, linux/bpf_common.h
_USER_NOTIF: Final = 0x7FC00000
_NEW_LISTENER: Final = 1 << 3
_WAIT_KILLABLE: Final = 1 << 5
_CONTINUE: Final = 1
_RECEIVE: Final = 0xC0502100
_SEND: Final = 0xC0182101
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_INSTRUCTION: Final = struct.Struct("=HBBI")
_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def stop_at_calls() -> int:
    """Put the filter into this process; the descriptor of its listener. Raises OSError."""
    architecture = this_architecture()
    if architecture is None:
        raise OSError("the system calls of this machine are not known")
    numbers = [architecture.numbers[name] for name in _CALLS if name in architecture.numbers]
    steps = [(_LOAD, 0, 0, 0), *((_EQUAL, len(numbers) - at, 0, number) for at, number in enumerate(numbers))]
    code = b"".join(_INSTRUCTION.pack(*each) for each in (*steps, (_RETURN, 0, 0, ALLOW), (_RETURN, 0, 0, _USER_NOTIF)))
    program = _Program(len(code) // 8, code)
    flags = _NEW_LISTENER | _WAIT_KILLABLE
    found: int = _libc.syscall(architecture.numbers["seccomp"], 1, flags, ctypes.byref(program))
    if found < 0:
        raise OSError(ctypes.get_errno(), f"seccomp: {os.strerror(ctypes.get_errno())}")
    return found


@dataclass(frozen=True, slots=True)
class Target:
    """kind: of process. step: its how many-th call from the beginning of the window, over all processes of the kind."""

    kind: str
    step: int
    how: str


class Steps:
    """The calls of one tree of processes. `turn` has to be called again and again, or they wait."""

    def __init__(self, main: int, listener: int) -> None:
        """main: the first process. listener: what `stop_at_calls` returned, in this process."""
        self.counts: Counter[str] = Counter()
        """Calls since the beginning of the window, by kind of process."""
        self.killed: tuple[int, str, str] | None = None
        """The process that was killed, its kind, and how."""
        self._main = main
        self._main_kind = "supervisor"
        self._workers: set[int] = set()
        self._listener = listener
        self._target: Target | None = None
        self._counting = False
        self._poller = select.poll()
        self._poller.register(listener, select.POLLIN)
        self._open = True

    def close(self) -> None:
        """Close the listener."""
        os.close(self._listener)

    def begin(self, target: Target | None = None) -> None:
        """Count from here on, and kill the target when it comes."""
        self.counts.clear()
        self.killed = None
        self._target = target
        self._counting = True

    def end(self) -> None:
        """Count no more, and kill nothing."""
        self._counting = False
        self._target = None

    def turn(self, seconds: float = 0.005) -> None:
        """Let the calls continue that come within this time."""
        if not self._open:
            time.sleep(seconds)
            return
        wait = seconds * 1000
        while ready := self._poller.poll(wait):
            if not ready[0][1] & select.POLLIN:
                # The last process has ended.
                self._open = False
                return
            wait = 0
            self._answer()

    def _answer(self) -> None:
        notice = bytearray(80)
        try:
            fcntl.ioctl(self._listener, _RECEIVE, notice)
        except OSError:
            # It was killed meanwhile.
            return
        identity, pid, _, number = struct.unpack_from("=QIIi", notice)
        if self._counting and self._is_target(pid, number):
            assert self._target is not None
            target, self._target = self._target, None
            if target.how != "KILL":
                self._continue(identity)
            self.kill(pid, target)
            return
        self._continue(identity)

    def _continue(self, identity: int) -> None:
        with contextlib.suppress(OSError):
            fcntl.ioctl(self._listener, _SEND, bytearray(struct.pack("=QqiI", identity, 0, 0, _CONTINUE)))

    def kill(self, pid: int, target: Target) -> None:
        """Kill a process as a target says."""
        self.killed = pid, target.kind, target.how
        with contextlib.suppress(ProcessLookupError):
            if target.how == "STOP":
                # Behind its call; it stays so for a moment.
                os.kill(pid, signal.SIGSTOP)
                until(self, lambda: False, 0.03)
            os.kill(pid, signal.SIGTERM if target.how == "TERM" else signal.SIGKILL)

    def _is_target(self, pid: int, number: int) -> bool:
        kind = self._kind(pid)
        self.counts[kind] += 1
        if pid == self._main and number == _execve():
            self._main_kind = "successor"
        target = self._target
        return target is not None and kind == target.kind and self.counts[kind] >= target.step

    def _kind(self, pid: int) -> str:
        if pid == self._main:
            return self._main_kind
        if pid in self._workers:
            return "worker"
        with contextlib.suppress(OSError, IndexError):
            with open(f"/proc/{pid}/status") as status:
                text = status.read()
            if text.split("Uid:", 1)[1].split()[0] != "0":
                self._workers.add(pid)
                return "worker"
            return "child" if text.startswith("Name:\tpython") or _is_code(pid) else "command"
        return "child"


def _execve() -> int:
    architecture = this_architecture()
    return -1 if architecture is None else architecture.numbers["execve"]


def _is_code(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return os.path.basename(os.readlink(f"/proc/{pid}/exe")).startswith("python")
    return False


def until(steps: Steps, condition: Callable[[], bool], seconds: float) -> bool:
    """Let the calls continue until the condition holds: True; False if it does not within this time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        steps.turn()
    return True
