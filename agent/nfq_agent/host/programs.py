"""Which program has a socket: the executable of the process behind it, found by a process of its own.

A confined worker may not look at other processes (Landlock forbids what ptrace(2) forbids), so it asks a child that was forked
before, and that keeps nothing but the right to look. The child walks the processes of the socket's control group alone, never all
of /proc. It never guesses: what it cannot find out for sure is unknown.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from nfq_agent.host.cgroups import CgroupPaths, mounted
from nfq_agent.host.fork import fork
from nfq_agent.host.time_share import TimeShare
from nfq_agent.host.users import CAP_SYS_PTRACE, User, become, has_capability

# The inode of a socket, the id of its control group.
_QUESTION: Final = struct.Struct("=QQ")
# Seconds that one search may take, and that a worker waits for its end.
_WITHIN: Final = 0.02
_PATIENCE: Final = 0.1
# Searches may take this share of the time, and this many seconds at once: a program with many files must not delay a queue.
_SHARE: Final = 0.25
_AT_ONCE: Final = 1.0
_LONGEST: Final = 4096


class ProgramFinder:
    """Answers for one worker. It must be made before the worker confines itself; its process ends with the worker."""

    def __init__(
        self, user: User | None, clock: Callable[[], float] = time.monotonic, on_skip: Callable[[], None] | None = None
    ) -> None:
        """user: as whom the process runs, with CAP_SYS_PTRACE where this process has it; None: as this one. Raises OSError.

        on_skip: called for a question that is not asked, since searches took too much time.
        """
        self.complete = has_capability(CAP_SYS_PTRACE)
        """Whether it may look at the processes of other users; without, only those of its own are known."""
        self._searches = TimeShare(_SHARE, _AT_ONCE, clock)
        self._on_skip = on_skip
        keep = (CAP_SYS_PTRACE,) if self.complete else ()
        self._end, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._end.settimeout(_PATIENCE)

        def life() -> None:
            _close_all_but(theirs.fileno())
            if user is not None:
                become(user, keep)
            # The worker may end while a search runs, or before it has read an answer (unix_release_sock, net/unix/af_unix.c).
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                _serve(theirs)

        try:
            fork(life, ends_with_parent=True)
        except OSError:
            self._end.close()
            raise
        finally:
            theirs.close()

    def program(self, inode: int, cgroup: int | None) -> str | None:
        """The path of the program that has this socket, as its process sees it; None where it is not known."""
        if not inode or cgroup is None:
            return None
        if not self._searches.allows():
            if self._on_skip is not None:
                self._on_skip()
            return None
        with self._searches.taken():
            try:
                self._end.send(_QUESTION.pack(inode, cgroup))
                while True:
                    answer = self._end.recv(_QUESTION.size + _LONGEST)
                    if answer[: _QUESTION.size] == _QUESTION.pack(inode, cgroup):
                        break
                    if not answer:
                        return None
                    # The answer to an earlier question that timed out.
            except OSError:
                return None
        return answer[_QUESTION.size :].decode(errors="surrogateescape") or None

    def close(self) -> None:
        """End its process."""
        self._end.close()


def _close_all_but(kept: int) -> None:
    """Especially no queue: its packets would wait for this process."""
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))


def _serve(end: socket.socket) -> None:
    """Answer until the other end is closed. Raises BrokenPipeError or ConnectionResetError if an answer is lost by that."""
    root = mounted()
    paths = CgroupPaths(root)
    while len(question := end.recv(_QUESTION.size)) == _QUESTION.size:
        inode, cgroup = _QUESTION.unpack(question)
        path = paths.path(cgroup)
        found = None if root is None or path is None else program_of(inode, Path(f"{root}{path}"))
        end.send(question + os.fsencode(found or "")[:_LONGEST])


def program_of(inode: int, group: Path, within: float = _WITHIN) -> str | None:
    """The one program that has a socket among the processes of a control group. within: seconds that the search may take.

    None: no process of the group has it, processes with different programs have it, one of the group may not be looked at, or
    there was no time to look at all.
    """
    deadline = time.monotonic() + within
    wanted = f"mnt_id:\t{_mount_of_sockets()}\nino:\t{inode}\n".encode()
    found: set[str] = set()
    try:
        for process in _processes(group):
            if _has(process, wanted, deadline):
                found.add(os.readlink(f"/proc/{process}/exe"))
    except (OSError, TimeoutError):
        return None
    return found.pop() if len(found) == 1 else None


def _processes(group: Path) -> Iterator[str]:
    """Raises PermissionError where one is in a PID namespace that is not seen from here."""
    for process in (group / "cgroup.procs").read_text().split():
        if process == "0":
            raise PermissionError
        yield process


@functools.cache
def _mount_of_sockets() -> str:
    """The number of the kernel's mount of all sockets (proc_pid_fdinfo(5))."""
    with socket.socket(socket.AF_UNIX) as one:
        lines = Path(f"/proc/self/fdinfo/{one.fileno()}").read_text().splitlines()
    return next((line.split()[1] for line in lines if line.startswith("mnt_id:")), "")


def _has(process: str, wanted: bytes, deadline: float) -> bool:
    """Whether a process has the described socket open. False for one that has ended. Raises OSError, TimeoutError.

    Not by /proc/PID/fd: that can only be listed with the right to read all files (CAP_DAC_READ_SEARCH).
    """
    folder = f"/proc/{process}/fdinfo"
    try:
        numbers = os.listdir(folder)
    except (FileNotFoundError, ProcessLookupError):
        return False
    for number in numbers:
        if time.monotonic() > deadline:
            raise TimeoutError
        try:
            with open(f"{folder}/{number}", "rb", buffering=0) as told:
                if wanted in told.read(512):
                    return True
        except FileNotFoundError:
            # It was closed meanwhile.
            continue
    return False
