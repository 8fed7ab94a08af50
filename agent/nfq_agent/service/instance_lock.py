"""The right to be the one agent of an instance: a lock on a file, and a name in the network namespace.

The kernel releases both when the process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import struct
from pathlib import Path
from typing import Final

from nfq_agent.service.control import ControlError, cannot_make, folder, state_folder

# In place of the user that listens at a name.
_NOBODY: Final = -1
_UNKNOWN: Final = -2
# By this name the descriptor is handed over that tells of an agent which is started again.
_AGAIN: Final = "again"


class Lock:
    """The right to be the one agent of an instance: a lock that the kernel releases when the process ends."""

    def __init__(self, instance: str) -> None:
        self._path = folder() / f"{instance}.lock"
        self._file = self._open()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _written_in(self._file) or _owner_of(_claimed_by(instance))[0]
            os.close(self._file)
            raise ControlError(
                f"an agent of instance {instance} is already running (pid {holder or 'unknown'}); stop it, or "
                f"choose another instance"
            ) from None
        self._again: socket.socket | None = None
        self._instance = instance
        try:
            self._name = _claim(instance)
        except ControlError:
            os.close(self._file)
            raise
        try:
            if self._writable:
                os.ftruncate(self._file, 0)
                os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            self.release()
            raise ControlError(f"{self._path} cannot be written: {error.strerror}; free some space there") from error

    def _open(self) -> int:
        """The file, made if that is possible. In the unit it belongs to root, and flock(2) takes no right to write."""
        # Never through a link, regardless of the folder's owner.
        flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        self._writable = True
        try:
            try:
                self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
                file = os.open(self._path, os.O_RDWR | os.O_CREAT | flags, 0o644)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EROFS) or not self._path.is_file():
                    raise
                self._writable = False
                file = os.open(self._path, os.O_RDONLY | flags)
        except OSError as error:
            raise ControlError(cannot_make(self._path, error)) from error
        state = os.fstat(file)
        if not stat.S_ISREG(state.st_mode) or state.st_nlink != 1:
            os.close(file)
            raise ControlError(f"{self._path}: not a regular file of its own; remove it")
        if self._writable and state.st_uid == os.geteuid():
            # A lock that root made by hand, with any umask, must not prevent the service from starting.
            os.fchmod(file, 0o644)
        return file

    @property
    def descriptors(self) -> tuple[int, ...]:
        """The descriptor of the lock, which a child must not keep open."""
        return self._file, self._name.fileno()

    def handed(self) -> dict[str, int]:
        """For the program that is started again in this process: while it holds neither lock nor name, this tells that the agent
        lives. A lock that is handed over would be in the way of an earlier version, which takes one; this it closes."""
        with contextlib.suppress(OSError):
            again = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            self._again = again
            again.bind(_meanwhile(self._instance))
            again.listen(4096)
            return {_AGAIN: again.fileno()}
        return {}

    def release(self) -> None:
        """Release it. The file stays: removing it would let two agents hold two locks of one name."""
        if self._again is not None:
            self._again.close()
        self._name.close()
        os.close(self._file)


def _claim(instance: str) -> socket.socket:
    """The right to the rules of an instance in this network namespace, whatever /run is mounted here: a name of a socket that
    belongs to the namespace (unix(7), abstract). A process of another user that takes the name does not count.

    Raises ControlError where an agent has it, or has given it up while it is started again.
    """
    pid, uid = _owner_of(_meanwhile(instance))
    if uid != _NOBODY and pid != os.getpid() and (who := _claimant(pid, uid)):
        raise ControlError(f"an agent of instance {instance} is being started again ({who}); stop it, or choose another instance")
    name = _claimed_by(instance)
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        claim.bind(name)
        # It never accepts: a client that asks for its owner stays in the backlog.
        claim.listen(4096)
    except OSError as error:
        if who := _claimant(*_owner_of(name)):
            claim.close()
            raise ControlError(
                f"an agent of instance {instance} runs in this network namespace with another /run ({who}), in a container with "
                "--net=host for example; stop it, or choose another instance"
            ) from error
    return claim


def living_agent(instance: str) -> str:
    """Which agent of an instance lives in this network namespace, whether it answers or not: `pid 7`. Empty if there is none.

    It asks nothing of the agent: a question to the control socket would have systemd start one that has ended.
    """
    # An agent that is started again has the one, then both, then the other, then both, and the first again.
    for name in (_claimed_by(instance), _meanwhile(instance), _claimed_by(instance)):
        pid, uid = _owner_of(name)
        if uid != _NOBODY:
            break
    else:
        return ""
    # Where another user has the name, or has filled its backlog, the file tells.
    return _claimant(pid, uid) or _holder_of(folder() / f"{instance}.lock")


def _holder_of(path: Path) -> str:
    """The agent that has locked a file, in words; empty if none has."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return f"pid {_written_in(file) or 'unknown'}"
    finally:
        os.close(file)
    return ""


def _written_in(file: int) -> str:
    return os.pread(file, 32, 0).decode(errors="replace").strip()


def _claimant(pid: int, uid: int) -> str:
    """The agent that listens at a name, in words; empty where no process does, or one of another user. See `_owner_of`."""
    if uid not in (0, os.geteuid(), _owner_of_state()):
        return ""
    return f"pid {pid}" if pid else "in another PID namespace"


def _claimed_by(instance: str) -> str:
    """The name of the socket that stands for an instance."""
    return f"\0nfq-agent/{instance}"


def _meanwhile(instance: str) -> str:
    """The name of the socket that stands for an instance while its agent is started again in place."""
    return f"\0nfq-agent/{instance}/again"


def _owner_of_state() -> int:
    """The user whose agents write here; 0 before there was one."""
    try:
        return state_folder().stat().st_uid
    except OSError:
        return 0


def _owner_of(name: str) -> tuple[int, int]:
    """(pid, uid) of the process that listens at a name; pid 0 if it is not visible here, uid _NOBODY if no process listens.

    uid _UNKNOWN: one listens, but so many have asked that it has no room for another question.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(1)
        try:
            asking.connect(name)
        except ConnectionRefusedError:
            return 0, _NOBODY
        except OSError:
            return 0, _UNKNOWN
        pid, uid, _ = struct.unpack("3i", asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return pid, uid
