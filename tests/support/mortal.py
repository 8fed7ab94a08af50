"""An agent that is going to be killed: forked from this process, which has loaded its code, so that a life costs no imports.

It runs `nfq-agent run` as its command does, in a namespace, with a filter that stops it at its system calls (steps.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from namespace import Namespace
from steps import Steps, stop_at_calls

_PIDFD_GETFD: Final = 438
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Limits:
    """What the process gets. memory: bytes of address space beyond what it has. descriptors: beyond those it has. group: a folder
    of the memory cgroup."""

    memory: int | None = None
    descriptors: int | None = None
    group: Path | None = None


class Verb:
    """One verb of the command in a process of its own."""

    def __init__(
        self, namespace: Namespace, log: Path, *argv: str, limits: Limits | None = None, before: Callable[[], None] | None = None
    ) -> None:
        """log: where its output is added. before: called in the process before it begins."""
        self.argv = argv
        self.log = log
        self.code: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._live(namespace, log, limits or Limits(), before)

    def _live(self, namespace: Namespace, log: Path, limits: Limits, before: Callable[[], None] | None) -> None:
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if limits.group is not None:
                (limits.group / "cgroup.procs").write_text(str(os.getpid()))
            namespace.enter()
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.argv = ["nfq-agent", *self.argv]
            # What it runs when it starts again (reexec.command).
            sys.orig_argv = [sys.executable, "-m", "nfq_agent", *self.argv]
            if before is not None:
                before()
            os.closerange(3, 1024)
            if limits.memory is not None:
                bound = _address_space() + limits.memory
                resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
            if limits.descriptors is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, (3 + limits.descriptors, 3 + limits.descriptors))
            from nfq_agent.__main__ import main  # noqa: PLC0415  # from where the environment says

            main()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stderr.flush()
            os._exit(code)

    def ended(self) -> bool:
        """Whether it has ended; `code` is then its exit code, or minus the signal."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def kill(self) -> None:
        """End it."""
        if not self.ended():
            os.kill(self.pid, signal.SIGKILL)


class Mortal(Verb):
    """`run`, stopped at its calls."""

    def __init__(self, namespace: Namespace, log: Path, config: Path, limits: Limits | None = None) -> None:
        fetched, told = os.pipe()
        said, saying = os.pipe()

        def wait_for_listener() -> None:
            listener = stop_at_calls()
            os.write(saying, str(listener).encode())
            os.read(fetched, 1)

        super().__init__(namespace, log, "run", "--config", str(config), limits=limits, before=wait_for_listener)
        os.close(fetched)
        os.close(saying)
        try:
            number = os.read(said, 16)
            if not number:
                raise RuntimeError(f"the agent's process did not begin: {log.read_text()}")
            pidfd = os.pidfd_open(self.pid)
            listener: int = _libc.syscall(_PIDFD_GETFD, pidfd, int(number), 0)
            os.close(pidfd)
            if listener < 0:
                raise OSError(ctypes.get_errno(), "pidfd_getfd")
            os.set_inheritable(listener, False)
            os.write(told, b"x")
        finally:
            os.close(said)
            os.close(told)
        self.steps = Steps(self.pid, listener)


def _address_space() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()
