"""Finds the containers behind interfaces that appear: at once, and then once a second for a minute.

A runtime starts a container's processes after it has made its interface.
"""

from __future__ import annotations

import functools
from typing import Final

from nfq_agent.host.containers import Containers
from nfq_agent.host.links import Link
from nfq_agent.log import Log

# How often, once a second, the container behind a new interface is looked for.
_TRIES: Final = 60


@functools.lru_cache(maxsize=4)
def containers_of(sockets: tuple[str, ...], log: Log) -> Containers:
    """The containers of this host. All workers of an agent share them: one answer serves all. sockets: of runtimes."""

    def warn(text: str) -> None:
        log(text, "warning")

    if not sockets:
        return Containers(warn=warn)
    from nfq_agent.host.container_runtime import RuntimeSocket  # noqa: PLC0415  # it loads an HTTP client

    return Containers([RuntimeSocket(path, warn) for path in sockets], warn=warn)


class ContainerSearch:
    """The names of the containers behind some interfaces, by the interface's index in `named`."""

    def __init__(self, containers: Containers) -> None:
        self._containers = containers
        self.named: dict[int, str] = {}
        # Interfaces whose container is not known yet, and how often it is still looked for.
        self._unnamed: dict[int, tuple[Link, int]] = {}

    def seen(self, link: Link) -> None:
        """An interface is there, or has changed."""
        if link.index not in self.named:
            tries = self._unnamed.get(link.index, (link, _TRIES))[1]
            self._unnamed[link.index] = link, tries

    def gone(self, index: int) -> None:
        """Forget an interface."""
        self.named.pop(index, None)
        self._unnamed.pop(index, None)

    def found(self) -> dict[int, str]:
        """The containers that are known now and were not before, or by another name."""
        # An interface without a peer in another namespace leads to none; it may get one.
        wanted = {index: link.netns for index, (link, tries) in self._unnamed.items() if link.netns is not None and tries > 0}
        if not wanted:
            return {}
        names = self._containers.by_namespace()
        found = {index: names[netns] for index, netns in wanted.items() if netns in names}
        for index, name in found.items():
            # A runtime that does not answer yet may tell the name later.
            if not self._containers.may_be_named(name):
                del self._unnamed[index]
        new = {index: name for index, name in found.items() if self.named.get(index) != name}
        self.named |= new
        return new

    def later(self) -> dict[int, str]:
        """The same, once a second: it is looked for again, but not without end."""
        self._unnamed = {index: (link, tries - 1) for index, (link, tries) in self._unnamed.items()}
        return self.found()
