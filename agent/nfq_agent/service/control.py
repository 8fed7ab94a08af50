"""The control socket: one question and one answer, a JSON object on a line each, between the verbs and the running agent."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

_LONGEST: Final = 1 << 20
# A person who waits longer than this, in seconds, is told that it goes on.
_SOON: Final = 2.0
Respond = Callable[[dict[str, Any]], dict[str, Any]]


class ControlError(Exception):
    """The running agent can't be asked, or it said no."""


class NotRunning(ControlError):
    """No agent of this instance runs."""


def folder() -> Path:
    """Where sockets and locks are: systemd's RuntimeDirectory=, else /run/nfq-agent."""
    return Path(os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0] or "/run/nfq-agent")


def instances() -> list[str]:
    """The instances that have a socket here, whether an agent still answers there or not."""
    return sorted(path.stem for path in folder().glob("*.sock"))


class Lock:
    """The right to be the one agent of an instance: a lock that the kernel lets go with the process."""

    def __init__(self, instance: str) -> None:
        self._path = folder() / f"{instance}.lock"
        try:
            self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            # Not through a link: the folder belongs to the agent's user, and this may be root.
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            if os.geteuid() == 0:
                # What root made by hand must not be in the way of the service, whose user owns the folder.
                owner = self._path.parent.stat()
                os.fchown(self._file, owner.st_uid, owner.st_gid)
        except OSError as error:
            raise ControlError(f"{self._path}: {error.strerror}; start as root, or make {self._path.parent} writable") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._file, 32, 0).decode(errors="replace").strip()
            os.close(self._file)
            raise ControlError(
                f"an agent of instance {instance} runs already (pid {holder or 'unknown'}); stop it, or choose another instance"
            ) from None
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def fileno(self) -> int:
        """Its descriptor, which no child may keep open."""
        return self._file

    def release(self) -> None:
        """Let it go. The file stays: removing it would let two agents hold two locks of one name."""
        os.close(self._file)


class Server:
    """The agent's end. Only the agent's own user and root can ask."""

    def __init__(self, instance: str) -> None:
        self._path = folder() / f"{instance}.sock"
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.bind(str(self._path))
        self._path.chmod(0o600)
        self._socket.listen(16)
        self._socket.setblocking(False)

    def fileno(self) -> int:
        """For a selector: readable when somebody asks."""
        return self._socket.fileno()

    def serve_one(self, respond: Respond) -> None:
        """Take one question and answer it. Someone who connects and says nothing is left after half a second."""
        try:
            connection, _ = self._socket.accept()
        except (BlockingIOError, ConnectionError):
            return
        with connection:
            connection.settimeout(0.5)
            try:
                question = _receive(connection)
            except (OSError, ValueError):
                return
            reply = respond(question)
            # Who asked may be gone by now.
            with contextlib.suppress(OSError):
                connection.settimeout(5)
                connection.sendall(json.dumps(reply).encode() + b"\n")

    def close(self) -> None:
        """Stop listening and take the socket away."""
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()


def ask(
    instance: str, question: dict[str, Any], timeout: float = 30.0, waiting: Callable[[], None] | None = None
) -> dict[str, Any]:
    """The answer of the running agent of an instance. waiting: called once if that takes more than two seconds.

    Raises NotRunning, or ControlError if it does not answer within `timeout` seconds.
    """
    path = folder() / f"{instance}.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as end:
        end.settimeout(timeout)
        try:
            end.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise NotRunning(f"no agent of instance {instance} is running") from error
        except OSError as error:
            raise ControlError(f"{path}: {error.strerror or error}; ask as root") from error
        try:
            end.sendall(json.dumps(question).encode() + b"\n")
            if waiting is not None and not select.select([end], [], [], min(_SOON, timeout))[0]:
                waiting()
            return _receive(end)
        except TimeoutError as error:
            raise ControlError(f"the agent of instance {instance} did not answer within {timeout:g} s") from error
        except (OSError, ValueError) as error:
            raise ControlError(f"the agent of instance {instance} ended before it answered") from error


def _receive(end: socket.socket) -> dict[str, Any]:
    data = b""
    while not data.endswith(b"\n"):
        chunk = end.recv(65536)
        if not chunk or len(data) > _LONGEST:
            raise ValueError("no whole line")
        data += chunk
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError("no object")
    return value
