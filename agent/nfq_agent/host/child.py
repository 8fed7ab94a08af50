"""A child process with a control socket: how a worker is started, told what to do, ended and reaped."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import resource
import select
import signal
import socket
import time
from collections.abc import Callable, Iterable
from typing import Final

from nfq_agent.host.fork import fork, how_it_ended, reap
from nfq_agent.host.users import User, UserError, become

# The words on the control socket. The child says READY once it serves, or could; the parent says STOP (end now), or DRAIN (take
# nothing new, end when the work is done, which may take so long), or LEAVE (the same without a limit in time).
READY: Final = b"ready\n"
STOP: Final = b"stop\n"
DRAIN: Final = b"drain\n"
LEAVE: Final = b"leave\n"
# A child that is prepared waits for GO. After STOP it says DONE when it has stopped reading and owes nothing.
GO: Final = b"go\n"
DONE: Final = b"done\n"
# Of -1000 to 1000: a worker is replaced when it ends, but nothing replaces the supervisor and takes its rules out.
_OOM_SCORE: Final = 500
# Seconds between two calls of `beat` while a caller waits for a child.
BEAT: Final = 0.25


class NotReady(Exception):
    """The child ended, or did not say READY in time."""


def bound_memory(limit: int) -> None:
    """Limit this process to `limit` bytes of its own (RLIMIT_DATA of setrlimit(2); since Linux 4.7 private mappings too).

    An allocation beyond that fails with MemoryError. A lower limit that is already set stays.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def prefer_for_oom() -> None:
    """Let the kernel, when it is short of memory, end this process before others (oom_score_adj of proc_pid_oom_score_adj(5))."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write(str(_OOM_SCORE))


class Child:
    """One process that runs `body(control)`; with a `user`, as that user with the capabilities `keep` alone.

    Its end of the control socket reads EOF when the parent has ended, also after SIGKILL. Signals to the process group (Ctrl-C
    on a terminal) do not end it.
    """

    def __init__(
        self,
        title: str,
        body: Callable[[socket.socket], None],
        user: User | None = None,
        keep: tuple[int, ...] = (),
        close: Iterable[int] = (),
    ) -> None:
        """Fork. close: descriptors of the parent that the child must not keep open. Raises OSError."""
        self.title = title
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)

        def life() -> None:
            if user is not None:
                # Before: /proc/self belongs to root once the process has changed its user.
                prefer_for_oom()
                become(user, keep)
            body(theirs)

        try:
            self.pid = fork(life, [*close, self.control.fileno()])
        except OSError:
            self.control.close()
            raise
        finally:
            theirs.close()
        self._watch(os.pidfd_open(self.pid))

    def _watch(self, pidfd: int) -> None:
        self.control.setblocking(False)
        self.pidfd = pidfd
        self.ready = False
        self.done = False
        """It has said DONE."""
        self.exit: int | None = None

    @property
    def identity(self) -> list[int]:
        """Its pid, and when it was started: together they are unique."""
        return [self.pid, started(self.pid) or 0]

    @classmethod
    def adopted(cls, title: str, control: int | None, identity: object) -> Child | None:
        """A child of a process before this one, if it still runs; else `control` is closed.

        control: this end of its socket, which the object takes over; without one the child can only be killed.
        """
        pidfd = None
        match identity:
            case [int(pid), int(since)]:
                with contextlib.suppress(OSError):
                    pidfd = os.pidfd_open(pid)
                # Only now is it sure that the number is not given to another process meanwhile.
                if pidfd is not None and started(pid) != since:
                    os.close(pidfd)
                    pidfd = None
        if pidfd is None:
            if control is not None:
                os.close(control)
            return None
        if control is None:
            ours, theirs = socket.socketpair()
            theirs.close()
            control = ours.detach()
        child = cls.__new__(cls)
        child.title, child.pid = title, pid
        child.control = socket.socket(fileno=control)
        child._watch(pidfd)  # noqa: SLF001  # its own class
        child.ready = True
        return child

    def wait_ready(self, within: float, beat: Callable[[], None] = lambda: None) -> None:
        """Return once the child has said READY. beat: called now and then while it waits. Raises NotReady after `within` seconds.

        A child that ended is reaped.
        """
        deadline = time.monotonic() + within
        poller = select.poll()
        poller.register(self.control.fileno(), select.POLLIN)
        poller.register(self.pidfd, select.POLLIN)
        while not self.ready:
            left = deadline - time.monotonic()
            if left <= 0:
                raise NotReady(f"{self.title} did not become ready within {within:g} s")
            poller.poll(min(left, BEAT) * 1000)
            beat()
            if READY in self.heard():
                self.ready = True
            elif self.reap():
                raise NotReady(f"{self.title} ended before it was ready ({self.how_it_ended}); see the lines above")

    def wait_end(self, within: float, beat: Callable[[], None] = lambda: None) -> bool:
        """True once the child has ended, False if it still runs after `within` seconds. It is not reaped."""
        deadline = time.monotonic() + within
        poller = select.poll()
        poller.register(self.pidfd, select.POLLIN)
        while not poller.poll(max(0.0, min(BEAT, deadline - time.monotonic())) * 1000):
            if time.monotonic() >= deadline:
                return False
            beat()
        return True

    def wait_done(self, within: float) -> bool:
        """True once it has said DONE or has ended, False if it has not after `within` seconds."""
        deadline = time.monotonic() + within
        poller = select.poll()
        poller.register(self.control.fileno(), select.POLLIN)
        poller.register(self.pidfd, select.POLLIN)
        while not self.done:
            ready = dict(poller.poll(max(0.0, deadline - time.monotonic()) * 1000))
            if DONE in self.heard():
                self.done = True
            elif self.pidfd in ready:
                return True
            elif ready.get(self.control.fileno(), 0) & select.POLLHUP:
                # It has closed its end, or has none: only its end is left to wait for.
                poller.unregister(self.control.fileno())
            if not self.done and time.monotonic() >= deadline:
                return False
        return True

    def heard(self) -> bytes:
        """What the child has said since the last call; empty if nothing."""
        try:
            return self.control.recv(4096)
        except (BlockingIOError, ConnectionError):
            return b""

    def tell(self, word: bytes) -> None:
        """Send a word to the child. It is lost if the child has ended."""
        with contextlib.suppress(OSError):
            self.control.send(word, socket.MSG_NOSIGNAL)

    def kill(self) -> None:
        """End the child at once (SIGKILL). Raises PermissionError."""
        if self.exit is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            try:
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            except PermissionError:
                # Root without CAP_KILL, as in a container. A process of the child's own user may.
                user = _user_of(self.pid)
                if user is None or reap(fork(functools.partial(self._kill_as, user))) != 0:
                    raise

    def _kill_as(self, user: User) -> int:
        with contextlib.suppress(OSError, UserError):
            become(user, ())
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            return 0
        return 1

    def reap(self, block: bool = False) -> bool:
        """True once it has ended and is reaped; `exit` is then its exit code, or minus the signal that ended it."""
        if self.exit is not None:
            return True
        try:
            self.exit = reap(self.pid, block)
        except ChildProcessError:
            # It is the child of a process that has ended: this one does not learn its exit status.
            if self.wait_end(math.inf if block else 0.0):
                self.exit = 0
        if self.exit is None:
            return False
        os.close(self.pidfd)
        self.control.close()
        return True

    def leave(self) -> None:
        """Close this process's descriptors of it, and let it run. Another descriptor of its control socket must keep it alive."""
        os.close(self.pidfd)
        self.control.close()

    @property
    def memory(self) -> int | None:
        """Resident bytes (statm of proc(5)); None if the process has ended."""
        try:
            with open(f"/proc/{self.pid}/statm") as statm:
                return int(statm.read().split()[1]) * resource.getpagesize()
        except (OSError, IndexError):
            return None

    @property
    def how_it_ended(self) -> str:
        """As text: `exit code 1`, `SIGKILL`, `running`."""
        return "running" if self.exit is None else how_it_ended(self.exit)


def started(pid: int) -> int | None:
    """When a process was started, in clock ticks since the boot (proc_pid_stat(5)); None if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _user_of(pid: int) -> User | None:
    """The real user and group of a process (Uid and Gid of proc(5)); None for a process that cannot be seen."""
    try:
        with open(f"/proc/{pid}/status") as status:
            found = dict(line.split(":", 1) for line in status)
        return User(int(found["Uid"].split()[0]), int(found["Gid"].split()[0]))
    except (OSError, KeyError, ValueError):
        return None
