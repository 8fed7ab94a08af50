"""The owner of the socket of a packet's flow, by one exact question to the kernel: no walk through /proc, no capability.

Where the program is asked for, a process beside it looks for that among those of the socket's control group (programs.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from nfq_agent.host.cgroups import CgroupPaths, mounted
from nfq_agent.host.jail.calls import ProcessNeeds
from nfq_agent.host.programs import ProgramFinder
from nfq_agent.host.sock_diag import KernelQuestions
from nfq_agent.owner import Owner, Owners
from nfq_agent.packet import Hook, Packet

_SENT: Final = frozenset((Hook.OUTPUT, Hook.POSTROUTING))
_RECEIVED: Final = frozenset((Hook.INPUT, Hook.PREROUTING))


class HostOwners(Owners):
    """Asks this host's kernel. The sockets are opened at once, since a worker may open none later."""

    def __init__(self, programs: ProgramFinder | None = None) -> None:
        """programs: finds the program of each socket; None: no program is asked for."""
        self._programs = programs
        self._questions = KernelQuestions()
        self._root = mounted()
        self._cgroups = CgroupPaths(self._root)

    @property
    def needs(self) -> ProcessNeeds:
        """What a confined process must be allowed for it: its questions, and the names of control groups."""
        headers, sockets = self._questions.fixed
        return ProcessNeeds(headers=(headers,), fixed=sockets, reads=() if self._root is None else (str(self._root),))

    def close(self) -> None:
        """Close the sockets."""
        self._questions.close()
        if self._programs is not None:
            self._programs.close()

    def names(self, packet: Packet) -> Mapping[str, Any]:
        """What is known of the owner."""
        owner = self.of(packet)
        return {} if owner is None else owner.facts

    def of(self, packet: Packet) -> Owner | None:
        """The owner; None for what is forwarded, has no ports, or has no socket any more."""
        five_tuple = packet.headers.five_tuple
        if five_tuple.sport is None or five_tuple.dport is None:
            return None
        source, destination = (five_tuple.src, five_tuple.sport), (five_tuple.dst, five_tuple.dport)
        if packet.hook in _SENT:
            found = self._questions.owner(five_tuple.protocol, source, destination, packet.outdev)
        elif packet.hook in _RECEIVED:
            found = self._questions.owner(five_tuple.protocol, destination, source, packet.indev)
        else:
            return None
        if found is None:
            return None
        cgroup = None if found.cgroup is None else self._cgroups.path(found.cgroup)
        exe = None if self._programs is None else self._programs.program(found.inode, found.cgroup)
        return Owner(found.uid, found.inode, cgroup, exe)
