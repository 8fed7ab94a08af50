"""The control socket: one question and one answer, a JSON object on a line each, between the verbs and the running agent.

The agent's end never waits for a client: it reads and writes what is possible at once, and ends an exchange that takes too long.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import select
import selectors
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from nfq_agent.service.question import json_object, parse
from nfq_agent.service.rights import READERS, group_id, refusal

# The longest question and the longest answer, in bytes. An answer holds the status of every rule.
_QUESTION: Final = 4096
_ANSWER: Final = 1 << 26
# Seconds that a client may take to ask, and to read the answer; what the agent does in between does not count.
DEADLINE: Final = 2.0
# Clients at a time; others wait in the backlog.
_CLIENTS: Final = 16
# After so many seconds of waiting, the verb prints that the agent is still working.
_SOON: Final = 2.0
_BACKLOG: Final = 16
# The name under which the listening socket is passed on: FileDescriptorName= of nfq-agent.socket.
SOCKET: Final = "control"
Respond = Callable[[dict[str, Any]], dict[str, Any]]


class ControlError(Exception):
    """The running agent cannot be asked, or it refused."""


class NotRunning(ControlError):
    """No agent of this instance runs."""


def state_folder() -> Path:
    """The folder of what the agent writes beside its sockets: systemd's RuntimeDirectory=, else /run/nfq-agent/state."""
    return Path(os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0] or "/run/nfq-agent/state")


def folder() -> Path:
    """The folder of sockets and locks. It belongs to root: under systemd the agent cannot write in it."""
    return state_folder().parent


def instances() -> list[str]:
    """The instances that have a socket here, whether an agent still answers there or not."""
    return sorted(path.stem for path in folder().glob("*.sock"))


class Lock:
    """The right to be the one agent of an instance: a lock that the kernel releases when the process ends."""

    def __init__(self, instance: str) -> None:
        self._path = folder() / f"{instance}.lock"
        self._file = self._open()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._file, 32, 0).decode(errors="replace").strip() or _owner_of(_claimed_by(instance))[0]
            os.close(self._file)
            raise ControlError(
                f"an agent of instance {instance} is already running (pid {holder or 'unknown'}); stop it, or "
                f"choose another instance"
            ) from None
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
        # Not through a link, whatever user owns the folder.
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
            raise ControlError(_cannot_make(self._path, error)) from error
        state = os.fstat(file)
        if not stat.S_ISREG(state.st_mode) or state.st_nlink != 1:
            os.close(file)
            raise ControlError(f"{self._path}: not a regular file of its own; remove it")
        if self._writable and state.st_uid == os.geteuid():
            # A lock that root made by hand, with any umask, must not keep the service from starting.
            os.fchmod(file, 0o644)
        return file

    @property
    def descriptors(self) -> tuple[int, ...]:
        """The descriptor of the lock, which a child must not keep open."""
        return self._file, self._name.fileno()

    def release(self) -> None:
        """Release it. The file stays: removing it would let two agents hold two locks of one name."""
        self._name.close()
        os.close(self._file)


def _cannot_make(path: Path, error: OSError) -> str:
    """The message about a lock or a socket that cannot be made."""
    taken = "remove it" if path.parent.is_dir() else f"remove {path.parent}, which is no folder"
    remedies = {
        errno.ENOSPC: "free some space there",
        errno.EROFS: f"mount {path.parent} writable",
        **dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EADDRINUSE), taken),
    }
    return f"{path}: {error.strerror}; {remedies.get(error.errno or 0, f'start as root, or make {path.parent} writable')}"


def _claim(instance: str) -> socket.socket:
    """The right to the rules of an instance in this network namespace, whatever /run is mounted here: a name of a socket that
    belongs to the namespace (unix(7), abstract). A process of another user that takes the name does not count.

    Raises ControlError where an agent has it.
    """
    name = _claimed_by(instance)
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        claim.bind(name)
        # It never accepts: a client that asks for its owner stays in the backlog.
        claim.listen(4096)
    except OSError as error:
        pid, uid = _owner_of(name)
        if uid in (0, os.geteuid(), _owner_of_state()):
            claim.close()
            who = f"pid {pid}" if pid else "in another PID namespace"
            raise ControlError(
                f"an agent of instance {instance} runs in this network namespace with another /run ({who}), in a container with "
                "--net=host for example; stop it, or choose another instance"
            ) from error
    return claim


def _claimed_by(instance: str) -> str:
    """The name of the socket that stands for an instance."""
    return f"\0nfq-agent/{instance}"


def _owner_of_state() -> int:
    """The user whose agents write here; -1 before there was one."""
    try:
        return state_folder().stat().st_uid
    except OSError:
        return -1


def _owner_of(name: str) -> tuple[int, int]:
    """(pid, uid) of the process that listens at a name; pid 0 if it is not visible here, uid -1 if no process listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(1)
        try:
            asking.connect(name)
        except OSError:
            return 0, -1
        pid, uid, _ = struct.unpack("3i", asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return pid, uid


@dataclass(eq=False)
class _Client:
    """One exchange: `asked` is read until a line is whole, then `reply` is written."""

    end: socket.socket
    deadline: float
    asked: bytes = b""
    reply: memoryview = field(default_factory=lambda: memoryview(b""))


class Server:
    """The agent's end. Only root, the agent's own user, and members of the group READERS reach it."""

    def __init__(self, instance: str, clock: Callable[[], float] = time.monotonic, passed: int | None = None) -> None:
        """clock: monotonic seconds. passed: the listening socket, if the service manager or the agent before had it open."""
        self._clock = clock
        self._path = folder() / f"{instance}.sock"
        self._clients: set[_Client] = set()
        self._selector: selectors.BaseSelector | None = None
        self._socket = self._bind() if passed is None else socket.socket(fileno=passed)
        self._socket.setblocking(False)

    def _bind(self) -> socket.socket:
        """A new socket at the path. Raises ControlError."""
        try:
            return self._made()
        except OSError as error:
            raise ControlError(_cannot_make(self._path, error)) from error

    def _made(self) -> socket.socket:
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        readers = group_id(READERS)
        # The mode comes from the umask: a later chmod could follow a link to another file.
        before = os.umask(0o177 if readers is None else 0o117)
        try:
            made.bind(str(self._path))
        finally:
            os.umask(before)
        if readers is not None:
            with contextlib.suppress(OSError):
                os.chown(self._path, -1, readers, follow_symlinks=False)
        made.listen(_BACKLOG)
        return made

    @property
    def handed(self) -> dict[str, int]:
        """What the program gets that is started again in this process: the socket keeps its file, owner and clients."""
        return {SOCKET: self._socket.fileno()}

    @property
    def descriptors(self) -> Iterator[int]:
        """The descriptors that a child must not keep open."""
        yield self._socket.fileno()
        for client in self._clients:
            yield client.end.fileno()

    def serve(self, selector: selectors.BaseSelector, respond: Respond) -> None:
        """Answer questions from now on, when the selector calls. respond: must not raise."""
        self._selector = selector
        self._respond = respond
        selector.register(self._socket, selectors.EVENT_READ, self._accept)

    def expire(self) -> float | None:
        """End the exchanges that take too long. The monotonic time when this is due again, None if there is nothing to end."""
        now = self._clock()
        for client in [client for client in self._clients if client.deadline <= now]:
            # What was asked in time is answered: the agent may have been busy with the rules, waiting for the xtables lock.
            if not client.reply:
                self._read(client)
            if client in self._clients and client.deadline <= now:
                self._end(client)
        return min((client.deadline for client in self._clients), default=None)

    def close(self) -> None:
        """Stop listening and remove the socket, unless it belongs to the service manager."""
        for client in list(self._clients):
            self._end(client)
        self._socket.close()
        with contextlib.suppress(OSError):
            self._path.unlink()

    def _accept(self) -> None:
        assert self._selector is not None
        if len(self._clients) >= _CLIENTS:
            # The oldest is closed, so that idle clients cannot block the administrator.
            self._end(min(self._clients, key=lambda client: client.deadline))
        try:
            end, _ = self._socket.accept()
        except (BlockingIOError, ConnectionError):
            return
        end.setblocking(False)
        client = _Client(end, self._clock() + DEADLINE)
        self._clients.add(client)
        self._selector.register(end, selectors.EVENT_READ, lambda: self._read(client))

    def _read(self, client: _Client) -> None:
        assert self._selector is not None
        try:
            chunk = client.end.recv(_QUESTION)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        client.asked += chunk
        if not chunk or len(client.asked) > _QUESTION:
            self._end(client)
            return
        if not client.asked.endswith(b"\n"):
            return
        reply = self._answer(client)
        # The time for a reload does not count as the client's.
        client.deadline = self._clock() + DEADLINE
        client.reply = memoryview(json.dumps(reply).encode() + b"\n")
        self._selector.modify(client.end, selectors.EVENT_WRITE, lambda: self._write(client))
        self._write(client)

    def _answer(self, client: _Client) -> dict[str, Any]:
        try:
            question = parse(client.asked)
        except ValueError as error:
            return {"ok": False, "message": f"not a question: {error}"}
        if reason := refusal(client.end, question.get("verb")):
            return {"ok": False, "message": reason}
        return self._respond(question)

    def _write(self, client: _Client) -> None:
        try:
            sent = client.end.send(client.reply, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return
        except OSError:
            sent = len(client.reply)
        client.reply = client.reply[sent:]
        if not client.reply:
            self._end(client)

    def _end(self, client: _Client) -> None:
        assert self._selector is not None
        self._selector.unregister(client.end)
        client.end.close()
        self._clients.discard(client)


def ask(
    instance: str, question: dict[str, Any], timeout: float = 30.0, waiting: Callable[[], None] | None = None
) -> dict[str, Any]:
    """The answer of the running agent of an instance. waiting: called once if that takes more than two seconds.

    Raises NotRunning, or ControlError if it does not answer within `timeout` seconds.
    """
    path = folder() / f"{instance}.sock"
    deadline = time.monotonic() + timeout
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as end:
        end.settimeout(timeout)
        try:
            end.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise NotRunning(f"no agent of instance {instance} is running") from error
        except OSError as error:
            raise ControlError(f"{path}: {error.strerror or error}; ask as root, or as a member of group {READERS}") from error
        try:
            end.sendall(json.dumps(question).encode() + b"\n")
            if waiting is not None and not select.select([end], [], [], min(_SOON, timeout))[0]:
                waiting()
            return _receive(end, deadline)
        except TimeoutError as error:
            raise ControlError(f"the agent of instance {instance} did not answer within {timeout:g} s") from error
        except (OSError, ValueError) as error:
            raise ControlError(f"the agent of instance {instance} ended before it answered") from error


def _receive(end: socket.socket, deadline: float) -> dict[str, Any]:
    """One line, read until the deadline. Raises TimeoutError, OSError, ValueError."""
    chunks: list[bytes] = []
    size = 0
    while not (chunks and chunks[-1].endswith(b"\n")):
        end.settimeout(max(0.001, deadline - time.monotonic()))
        chunk = end.recv(1 << 20)
        size += len(chunk)
        if not chunk or size > _ANSWER:
            raise ValueError("not a whole line")
        chunks.append(chunk)
    return json_object(b"".join(chunks))
