"""The containers of this host by the network namespace that their interfaces lead to. Reads, writes nothing.

A veth pair's end on the host names the namespace of the other end by a number (IFLA_LINK_NETNSID). Which container that is, the
control group of a process in that namespace tells, and its name the socket of its runtime, if one is given.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, Final

from nfq_agent.host.cgroups import groups, mounted
from nfq_agent.host.links import namespace_id
from nfq_agent.owner import Owner

# A runtime that does not answer within this time is not asked again for a while, in seconds: the supervisor waits for it.
_PATIENCE: Final = 0.3
_PAUSE: Final = 60.0
# The labels by which the kubelet names a pod.
_POD: Final = ("io.kubernetes.pod.namespace", "io.kubernetes.pod.name")
# How much of an id `Owner.container` gives.
_SHORT: Final = 12


class _UnixConnection(HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_PATIENCE)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket's path."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.sock.settimeout(_PATIENCE)
        self.sock.connect(self._path)


class Runtime:
    """The names of containers from the socket of Docker or Podman (GET /containers/json of the Docker Engine API)."""

    def __init__(self, path: str, warn: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> None:
        """warn: is told once that it does not answer."""
        self._path = path
        self._warn = warn
        self._clock = clock
        self._not_before = 0.0
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
            return dict(_named(each) for each in json.loads(answer.read()))
        except (OSError, HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
            self._not_before = self._clock() + _PAUSE
            if not self._said:
                self._said = True
                self._warn(f"{self._path} does not name containers: {error}; their ids are used")
            return {}
        finally:
            connection.close()


def _named(container: Mapping[str, Any]) -> tuple[str, str]:
    labels = container.get("Labels") or {}
    pod = [labels[label] for label in _POD if label in labels]
    return container["Id"][:_SHORT], "/".join(pod) if len(pod) == len(_POD) else container["Names"][0].removeprefix("/")


class Containers:
    """Finds the container behind an interface."""

    def __init__(self, runtimes: Sequence[Runtime] = (), root: Path | None = None) -> None:
        """root: of the control groups; this host's if None."""
        self._runtimes = runtimes
        self._root = mounted() if root is None else root
        self._names: dict[str, str] = {}

    def by_namespace(self) -> dict[int, str]:
        """The name of the container by the number of its network namespace; its id where no runtime tells the name.

        Of several containers in one namespace the first in the order of their control groups.
        """
        found: dict[int, str] = {}
        for path, container in sorted(self._all()):
            with contextlib.suppress(OSError):
                number = _namespace_of(path)
                if number is not None:
                    found.setdefault(number, container)
        if not set(found.values()) <= self._names.keys():
            # Only what runs now is remembered.
            self._names = {short: name for runtime in self._runtimes for short, name in runtime.names().items()}
        return {number: self._names.get(container, container) for number, container in found.items()}

    def _all(self) -> Iterator[tuple[str, str]]:
        if self._root is None:
            return
        for _, path in groups(str(self._root)):
            container = Owner(0, 0, path).container
            if container is not None:
                yield f"{self._root}{path}", container


def _namespace_of(group: str) -> int | None:
    """The number of the network namespace of a control group's first process. None: it has none, or it is not numbered here.

    Raises OSError: the process has ended, or this one may not see it (CAP_SYS_PTRACE, ProtectProc=).
    """
    with open(f"{group}/cgroup.procs") as processes:
        first = processes.readline().strip()
    # 0: in a PID namespace that is not seen from here.
    if first in ("", "0"):
        return None
    descriptor = os.open(f"/proc/{first}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return namespace_id(descriptor)
    finally:
        os.close(descriptor)
