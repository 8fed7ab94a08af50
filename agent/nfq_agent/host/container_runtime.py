"""The names of containers from the socket of their runtime. Loaded only where a socket is configured: it needs an HTTP parser."""

from __future__ import annotations

import contextlib
import io
import json
import re
import socket
import time
from collections.abc import Callable, Mapping
from http.client import HTTPException, HTTPResponse
from typing import Any, Final

from nfq_agent.host.containers import SHORT

# How long the supervisor waits for an answer when it asks, in seconds. Later calls read what has arrived since, without waiting.
_PATIENCE: Final = 0.3
# How long an answer may take. systemd starts Podman's service for a question, and it ends five seconds after its latest answer: a
# question that was given up early would find it ended each time.
_LONGEST: Final = 20.0
# Seconds without a question after a failure: the pause is short at first, and doubles.
_FIRST_PAUSE: Final = 1.0
_PAUSE: Final = 60.0
_MOST_BYTES: Final = 16 << 20
# With HTTP/1.0 the end of the answer is the end of the connection.
_QUESTION: Final = b"GET /containers/json HTTP/1.0\r\nHost: localhost\r\n\r\n"
# The labels by which the kubelet names a pod.
_POD: Final = ("io.kubernetes.pod.namespace", "io.kubernetes.pod.name")
# Podman's name of the container that holds a pod's namespaces; its traffic is that of the pod's other containers.
_HOLDER: Final = re.compile(r"[0-9a-f]{12}-infra")


class RuntimeSocket:
    """The names of containers from the socket of Docker or Podman (GET /containers/json of the Docker Engine API)."""

    def __init__(self, path: str, warn: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> None:
        """warn: called once if it does not answer."""
        self._path = path
        self._warn = warn
        self._clock = clock
        self._not_before = 0.0
        self._pause = _FIRST_PAUSE
        self._said = False
        # The connection of a question without a whole answer, what has come of that, and when it is given up.
        self._asked: socket.socket | None = None
        self._come = bytearray()
        self._until = 0.0

    def names(self) -> Mapping[str, str]:
        """Names by the first digits of the id: that of the pod where a label has it, else the container's.

        Empty on failure, and while the answer has not come. A container that only holds the namespaces of a pod of Podman is left
        out.
        """
        try:
            if self._asked is None and not self._ask():
                return {}
            if not self._arrived():
                return {}
            names = _names_of(bytes(self._come))
        except (OSError, HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
            self._close()
            self._not_before = self._clock() + self._pause
            self._pause = min(2 * self._pause, _PAUSE)
            if not self._said:
                self._said = True
                self._warn(f"{self._path} does not name containers: {error}; their ids are used")
            return {}
        self._close()
        self._pause = _FIRST_PAUSE
        return names

    def _ask(self) -> bool:
        """Send the question, and wait a moment for the answer. False during a pause. Raises OSError."""
        if self._clock() < self._not_before:
            return False
        self._asked = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._until = self._clock() + _LONGEST
        self._come.clear()
        self._asked.settimeout(_PATIENCE)
        self._asked.connect(self._path)
        self._asked.sendall(_QUESTION)
        return True

    def _arrived(self) -> bool:
        """Whether the answer is complete. Raises OSError."""
        assert self._asked is not None
        with contextlib.suppress(BlockingIOError, TimeoutError):
            while data := self._asked.recv(1 << 16):
                self._come += data
                if len(self._come) > _MOST_BYTES:
                    raise OSError(f"its answer has more than {_MOST_BYTES} bytes")
            return True
        self._asked.setblocking(False)
        if self._clock() > self._until:
            raise OSError(f"no answer within {_LONGEST:g} s")
        return False

    def _close(self) -> None:
        if self._asked is not None:
            self._asked.close()
            self._asked = None


class _Received:
    """Takes the place of a socket whose answer has been read."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, *_: object) -> io.BytesIO:
        return io.BytesIO(self._data)


def _names_of(answer: bytes) -> dict[str, str]:
    """The names in an answer. Raises what its parsers raise; OSError for a status that is not 200."""
    response = HTTPResponse(_Received(answer))  # type: ignore[arg-type]  # it takes its file alone
    response.begin()
    if response.status != 200:
        raise OSError(f"status {response.status}")
    names = dict(_named(each) for each in json.loads(response.read()))
    return {number: name for number, name in names.items() if not _HOLDER.fullmatch(name)}


def _named(container: Mapping[str, Any]) -> tuple[str, str]:
    labels = container.get("Labels") or {}
    pod = [labels[label] for label in _POD if label in labels]
    return container["Id"][:SHORT], "/".join(pod) if len(pod) == len(_POD) else container["Names"][0].removeprefix("/")
