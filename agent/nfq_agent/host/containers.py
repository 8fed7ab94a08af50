"""The containers of this host by the network namespace that their interfaces lead to. Reads, writes nothing.

A veth pair's end on the host names the namespace of the other end by a number (IFLA_LINK_NETNSID). Which container that is, the
control group of a process in that namespace tells; its name, its runtime (container_runtime.py), if one is given, and on a node
of Kubernetes the names of the logs.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol

from nfq_agent.host.cgroups import groups, mounted
from nfq_agent.host.links import namespace_id
from nfq_agent.host.users import CAP_SYS_PTRACE, has_capability
from nfq_agent.owner import Owner

# Where the kubelet links the logs of a node's containers: POD_NAMESPACE_CONTAINER-ID.log.
_LOGS: Final = Path("/var/log/containers")
_LOG: Final = re.compile(r"([^_]+)_([^_]+)_.+-([0-9a-f]{64})\.log")
# Seconds for which an answer about namespaces is reused: several workers ask at once when an interface appears.
_FRESH: Final = 0.2
# How much of an id `Owner.container` gives.
SHORT: Final = 12


def _of_pods(folder: Path) -> dict[str, str]:
    """NAMESPACE/POD by the first digits of a container's id, from the names of its logs. Empty where no kubelet runs."""
    try:
        found = [match for name in os.listdir(folder) if (match := _LOG.fullmatch(name))]
    except OSError:
        return {}
    return {match[3][:SHORT]: f"{match[2]}/{match[1]}" for match in found}


class Runtime(Protocol):
    """What knows names of containers: container_runtime.py."""

    def names(self) -> Mapping[str, str]:
        """Names by the first digits of the container's id. Empty on failure."""
        ...


class Containers:
    """Finds the container behind an interface."""

    def __init__(
        self,
        runtimes: Sequence[Runtime] = (),
        root: Path | None = None,
        warn: Callable[[str], object] = print,
        logs: Path = _LOGS,
    ) -> None:
        """root: of the control groups; this host's if None. warn: called once if containers cannot be found."""
        self._runtimes = runtimes
        self._root = mounted() if root is None else root
        self._warn = warn
        self._logs = logs
        self._warned = False
        self._names: dict[str, str] = {}
        self._latest: tuple[float, dict[int, str]] = -_FRESH, {}

    def by_namespace(self, now: float | None = None) -> dict[int, str]:
        """The name of the container by the number of its network namespace; its id where no runtime tells the name.

        Of several containers in one namespace, as in a pod, the first name in alphabetical order: the container that only holds
        the namespace has none. Where no name is known, the id of the first control group. now: monotonic seconds.
        """
        now = time.monotonic() if now is None else now
        if now >= self._latest[0] + _FRESH:
            self._latest = now, self._look()
        return self._latest[1]

    def may_be_named(self, name: str) -> bool:
        """Whether a container is known by its id alone, and a runtime may still tell its name."""
        return bool(self._runtimes) and name not in self._names.values()

    def _look(self) -> dict[int, str]:
        found: dict[int, list[str]] = {}
        obstacles: list[tuple[bool, str]] = []
        for path, container in sorted(self._all()):
            try:
                number = _namespace_of(path)
            except OSError as error:
                if text := _obstacle(error):
                    # A process that is hidden here has a path, and a remedy; one of another PID namespace may have none.
                    obstacles.append((error.filename is None, text))
                continue
            if number is not None:
                found.setdefault(number, []).append(container)
        if obstacles and not found and not self._warned:
            self._warned = True
            self._warn(f"the containers behind interfaces are not known: {min(obstacles)[1]}")
        if any(self._names.keys().isdisjoint(ids) for ids in found.values()):
            # Only what runs now is remembered: the answer of a runtime may come later.
            self._names = {each: self._names[each] for ids in found.values() for each in ids if each in self._names}
            self._names |= _of_pods(self._logs)
            for runtime in self._runtimes:
                self._names |= runtime.names()
        return {number: self._name_of(ids) for number, ids in found.items()}

    def _name_of(self, ids: Sequence[str]) -> str:
        """The name of the containers of one namespace. ids: in the order of their control groups."""
        return min((self._names[each] for each in ids if each in self._names), default=ids[0])

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
    """The number of the network namespace of a control group's first process. None: it has no process, or no number here, or the
    group was removed since it was listed.

    Raises OSError: the process has ended, or this one may not see it (CAP_SYS_PTRACE, ProtectProc=, another PID namespace).
    """
    try:
        with open(f"{group}/cgroup.procs") as processes:
            first = processes.readline().strip()
    except OSError as error:
        # A read of a removed group that is open is ENODEV (kernfs_get_active(), fs/kernfs).
        if error.errno in (errno.ENOENT, errno.ENODEV):
            return None
        raise
    if not first:
        return None
    if first == "0":
        raise PermissionError(errno.EPERM, "they are in a PID namespace that is not seen from here")
    descriptor = os.open(f"/proc/{first}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return namespace_id(descriptor)
    finally:
        os.close(descriptor)
