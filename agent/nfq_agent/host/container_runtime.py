"""The names of containers from the socket of their runtime. Loaded only where a socket is configured: it needs an HTTP client."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Mapping
from http.client import HTTPConnection, HTTPException
from typing import Any, Final

from nfq_agent.host.containers import SHORT

# A runtime that does not answer within this time is not asked again for a while, in seconds: the supervisor waits for it.
_PATIENCE: Final = 0.3
# The pause is short at first, and doubles: systemd starts Podman's service for the first question, which takes longer than that.
_FIRST_PAUSE: Final = 1.0
_PAUSE: Final = 60.0
# The labels by which the kubelet names a pod.
_POD: Final = ("io.kubernetes.pod.namespace", "io.kubernetes.pod.name")


class _UnixConnection(HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_PATIENCE)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket's path."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.sock.settimeout(_PATIENCE)
        self.sock.connect(self._path)


class RuntimeSocket:
    """The names of containers from the socket of Docker or Podman (GET /containers/json of the Docker Engine API)."""

    def __init__(self, path: str, warn: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> None:
        """warn: is told once that it does not answer."""
        self._path = path
        self._warn = warn
        self._clock = clock
        self._not_before = 0.0
        self._pause = _FIRST_PAUSE
        self._said = False

    def names(self) -> Mapping[str, str]:
        """Names by the first digits of the id: that of the pod where a label has it, else the container's. Empty on failure."""
        if self._clock() < self._not_before:
            return {}
        connection = _UnixConnection(self._path)
        try:
            connection.request("GET", "/containers/json")
            answer = connection.getresponse()
            if answer.status != 200:
                raise OSError(f"status {answer.status}")
            names = dict(_named(each) for each in json.loads(answer.read()))
        except (OSError, HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
            self._not_before = self._clock() + self._pause
            self._pause = min(2 * self._pause, _PAUSE)
            if not self._said:
                self._said = True
                self._warn(f"{self._path} does not name containers: {error}; their ids are used")
            return {}
        else:
            self._pause = _FIRST_PAUSE
            return names
        finally:
            connection.close()


def _named(container: Mapping[str, Any]) -> tuple[str, str]:
    labels = container.get("Labels") or {}
    pod = [labels[label] for label in _POD if label in labels]
    return container["Id"][:SHORT], "/".join(pod) if len(pod) == len(_POD) else container["Names"][0].removeprefix("/")
