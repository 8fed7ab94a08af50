"""The containers of this host by the network namespace that their interfaces lead to. Reads, writes nothing.

A veth pair's end on the host names the namespace of the other end by a number (IFLA_LINK_NETNSID). Which container that is, the
control group of a process in that namespace tells; its name, the socket of its runtime, if one is given, and on a node of
Kubernetes the names of the logs.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, Final

from nfq_agent.host.cgroups import groups, mounted
from nfq_agent.host.links import namespace_id
from nfq_agent.host.users import CAP_SYS_PTRACE, has_capability
from nfq_agent.owner import Owner

# A runtime that does not answer within this time is not asked again for a while, in seconds: the supervisor waits for it.
_PATIENCE: Final = 0.3
_PAUSE: Final = 60.0
# Where the kubelet links the logs of a node's containers: POD_NAMESPACE_CONTAINER-ID.log.
_LOGS: Final = Path("/var/log/containers")
_LOG: Final = re.compile(r"([^_]+)_([^_]+)_.+-([0-9a-f]{64})\.log")
# For so many seconds an answer about namespaces is used again: several workers ask at once when an interface appears.
_FRESH: Final = 0.2
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


def _of_pods(folder: Path) -> dict[str, str]:
    """NAMESPACE/POD by the first digits of a container's id, from the names of its logs. Empty where no kubelet runs."""
    try:
        found = [match for name in os.listdir(folder) if (match := _LOG.fullmatch(name))]
    except OSError:
        return {}
    return {match[3][:_SHORT]: f"{match[2]}/{match[1]}" for match in found}


class Containers:
    """Finds the container behind an interface."""

    def __init__(
        self,
        runtimes: Sequence[Runtime] = (),
        root: Path | None = None,
        warn: Callable[[str], object] = print,
        logs: Path = _LOGS,
    ) -> None:
        """root: of the control groups; this host's if None. warn: is told once that containers cannot be known."""
        self._runtimes = runtimes
        self._root = mounted() if root is None else root
        self._warn = warn
        self._logs = logs
        self._warned = False
        self._names: dict[str, str] = {}
        self._latest: tuple[float, dict[int, str]] = -_FRESH, {}

    def by_namespace(self, now: float | None = None) -> dict[int, str]:
        """The name of the container by the number of its network namespace; its id where no runtime tells the name.

        Of several containers in one namespace the first in the order of their control groups. now: monotonic seconds.
        """
        now = time.monotonic() if now is None else now
        if now >= self._latest[0] + _FRESH:
            self._latest = now, self._look()
        return self._latest[1]

    def _look(self) -> dict[int, str]:
        found: dict[int, str] = {}
        hidden = ""
        for path, container in sorted(self._all()):
            try:
                number = _namespace_of(path)
            except OSError as error:
                hidden = hidden or _obstacle(error)
                continue
            if number is not None:
                found.setdefault(number, container)
        if hidden and not found and not self._warned:
            self._warned = True
            self._warn(f"the containers behind interfaces are not known: {hidden}")
        if not set(found.values()) <= self._names.keys():
            # Only what runs now is remembered.
            self._names = _of_pods(self._logs)
            for runtime in self._runtimes:
                self._names |= runtime.names()
        return {number: self._names.get(container, container) for number, container in found.items()}

    def _all(self) -> Iterator[tuple[str, str]]:
        if self._root is None:
            return
        for _, path in groups(str(self._root)):
            container = Owner(0, 0, path).container
            if container is not None:
                yield f"{self._root}{path}", container


def _obstacle(error: OSError) -> str:
    """Why the namespace of a process cannot be read; an empty text if the process has ended."""
    if isinstance(error, ProcessLookupError) or (isinstance(error, FileNotFoundError) and has_capability(CAP_SYS_PTRACE)):
        return ""
    what = f"{error.filename or 'the network namespace of their processes'}: {error.strerror}"
    if has_capability(CAP_SYS_PTRACE):
        return f"{what}; allowed: the processes of the host (in a container: --pid=host)"
    return f"{what}; allowed: CAP_SYS_PTRACE (the drop-in containers.conf of the unit)"


def _namespace_of(group: str) -> int | None:
    """The number of the network namespace of a control group's first process. None: it has no process, or no number here.

    Raises OSError: the process has ended, or this one may not see it (CAP_SYS_PTRACE, ProtectProc=, another PID namespace).
    """
    with open(f"{group}/cgroup.procs") as processes:
        first = processes.readline().strip()
    if not first:
        return None
    if first == "0":
        raise PermissionError(errno.EPERM, "they are in a PID namespace that is not seen from here")
    descriptor = os.open(f"/proc/{first}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return namespace_id(descriptor)
    finally:
        os.close(descriptor)
