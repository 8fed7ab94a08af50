"""The control socket: one question and one answer, a JSON object on a line each, between the verbs and the running agent.

The agent's end never waits for a client: it reads and writes what is possible at once, and ends an exchange that takes too long.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import selectors
import socket
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
# Seconds after which a waiting verb prints that the agent is still working.
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
    """The folder of what the agent writes beside its sockets: `state` in systemd's RuntimeDirectory=, else in /run/nfq-agent.

    The packaged unit names `nfq-agent/state` itself, so that the folder around it stays root's.
    """
    path = Path(os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0] or "/run/nfq-agent/state")
    return path if path.name == "state" else path / "state"


def folder() -> Path:
    """The folder of sockets and locks. It belongs to root: under systemd the agent cannot write in it."""
    return state_folder().parent


def instances() -> list[str]:
    """The instances that have a socket here, whether an agent still answers there or not."""
    return sorted(path.stem for path in folder().glob("*.sock"))


def cannot_make(path: Path, error: OSError) -> str:
    """The message about a lock or a socket that cannot be made."""
    taken = "remove it" if path.parent.is_dir() else f"remove {path.parent}, which is not a folder"
    remedies = {
        errno.ENOSPC: "free some space there",
        errno.EROFS: f"mount {path.parent} writable",
        **dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EADDRINUSE), taken),
    }
    return f"{path}: {error.strerror}; {remedies.get(error.errno or 0, f'start as root, or make {path.parent} writable')}"


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
        """clock: monotonic seconds. passed: the listening socket, if the service manager or the previous agent had it open."""
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
            raise ControlError(cannot_make(self._path, error)) from error

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
        """For the program that is started again in this process: the socket keeps its file, owner and clients."""
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
