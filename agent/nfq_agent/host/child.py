"""A forked child with a control socket: how every worker is started, watched, told to stop, and reaped."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Final, NoReturn

from nfq_agent.host.users import User, become

_QUIET: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)


def bound_memory(limit: int) -> None:
    """Let this process have so many bytes of its own (RLIMIT_DATA of setrlimit(2), since Linux 4.7 private mappings too).

    What goes beyond fails with MemoryError. A lower limit that is in force already stays.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def end_after(life: Callable[[], None]) -> NoReturn:
    """In a forked child: do this, and end; with exit code 1 and the traceback on standard error if it raises."""
    code = 1
    try:
        life()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        # Not sys.exit: the parent's clean-up is not the child's to run.
        os._exit(code)


class Child:
    """One process that runs `body(control)` as `user` with the capabilities `keep` alone.

    Its end of the control socket reads EOF when the parent is gone, however it went. Signals to the process group (Ctrl-C
    on a terminal) do not reach it: it ends when it is told to.
    """

    def __init__(
        self,
        title: str,
        body: Callable[[socket.socket], None],
        user: User,
        keep: tuple[int, ...],
        close: Iterable[int] = (),
    ) -> None:
        """Fork. `close`: the parent's descriptors that the child must not keep alive. Raises OSError."""
        self.title = title
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        sys.stdout.flush()
        sys.stderr.flush()
        # What is there now is there for good: no collection in the child touches (and so copies) the parent's pages.
        gc.freeze()
        self.pid = os.fork()
        if self.pid == 0:
            self._child(body, theirs, user, keep, [*close, self.control.fileno()])
        gc.unfreeze()
        theirs.close()
        self.control.setblocking(False)
        self.pidfd = os.pidfd_open(self.pid)
        self.ready = False
        self.exit: int | None = None

    @staticmethod
    def _child(
        body: Callable[[socket.socket], None], control: socket.socket, user: User, keep: tuple[int, ...], close: list[int]
    ) -> None:
        def life() -> None:
            signal.set_wakeup_fd(-1)
            for number in _QUIET:
                signal.signal(number, signal.SIG_IGN)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for descriptor in close:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
            become(user, keep)
            body(control)

        end_after(life)

    def heard(self) -> bytes:
        """What the child said since the last time; empty if nothing."""
        try:
            return self.control.recv(4096)
        except (BlockingIOError, ConnectionError):
            return b""

    def tell(self, word: bytes) -> None:
        """Say a word to it; one that is gone does not hear it."""
        with contextlib.suppress(OSError):
            self.control.send(word, socket.MSG_NOSIGNAL)

    def kill(self) -> None:
        """End it at once (SIGKILL)."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def reap(self, block: bool = False) -> bool:
        """True once it has ended and is reaped; `exit` is then its exit code, or minus the signal that ended it."""
        if self.exit is not None:
            return True
        pid, status = os.waitpid(self.pid, 0 if block else os.WNOHANG)
        if pid == 0:
            return False
        self.exit = os.waitstatus_to_exitcode(status)
        os.close(self.pidfd)
        self.control.close()
        return True

    @property
    def memory(self) -> int | None:
        """Resident bytes (statm of proc(5)); None if it is gone."""
        try:
            with open(f"/proc/{self.pid}/statm") as statm:
                return int(statm.read().split()[1]) * resource.getpagesize()
        except (OSError, IndexError):
            return None

    @property
    def how_it_ended(self) -> str:
        """For people: `exit code 1`, `SIGKILL`."""
        if self.exit is None:
            return "running"
        if self.exit < 0:
            with contextlib.suppress(ValueError):
                return signal.Signals(-self.exit).name
            return f"signal {-self.exit}"
        return f"exit code {self.exit}"
