"""The owner of the socket of a packet's flow, by one exact question to the kernel: no walk through /proc, no capability.

Where the program is asked for, a process beside it looks for that among those of the socket's control group (programs.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from socket import IPPROTO_UDP
from typing import Any, Final

from nfq_agent.host.cgroups import CgroupPaths, mounted
from nfq_agent.host.jail.calls import ProcessNeeds
from nfq_agent.host.programs import ProgramFinder
from nfq_agent.host.sock_diag import KernelQuestions, SocketOwner
from nfq_agent.owner import Owner, Owners
from nfq_agent.packet import Hook, Packet

_SENT: Final = frozenset((Hook.OUTPUT, Hook.POSTROUTING))
_RECEIVED: Final = frozenset((Hook.INPUT, Hook.PREROUTING))


class HostOwners(Owners):
    """Asks this host's kernel. The sockets are opened at once, since a worker may open none later."""

    def __init__(self, programs: ProgramFinder | None = None) -> None:
        """programs: finds the program of each socket; None: no program is asked for."""
        self._programs = programs
        self._questions = KernelQuestions(routes=False, ports=True)
        # What a packet of the queue says about its sender's user is a number of the first user namespace.
        self._compares_users = _in_first_user_namespace()
        self._root = mounted()
        self._cgroups = CgroupPaths(self._root)
        # The packet that was asked about last, and the answer: an element, the record and the watch ask about the same one.
        self._last: tuple[Packet | None, Mapping[str, Any]] = None, {}

    @property
    def needs(self) -> ProcessNeeds:
        """What a confined process must be allowed for it: its questions, and the names of control groups."""
        return ProcessNeeds(sends=self._questions.sends, reads=() if self._root is None else (str(self._root),))

    def close(self) -> None:
        """Close the sockets."""
        self._questions.close()
        if self._programs is not None:
            self._programs.close()

    def names(self, packet: Packet) -> Mapping[str, Any]:
        """What is known of the owner. The kernel is asked once for each packet."""
        asked, known = self._last
        if packet is not asked:
            owner = self.of(packet)
            known = {} if owner is None else owner.facts
            self._last = packet, known
        return known

    def of(self, packet: Packet) -> Owner | None:
        """The owner; None for what is forwarded, has no ports, or has no socket any more, and where more than one may have it."""
        five_tuple = packet.headers.five_tuple
        if five_tuple.sport is None or five_tuple.dport is None:
            return None
        source, destination = (five_tuple.src, five_tuple.sport), (five_tuple.dst, five_tuple.dport)
        if packet.hook in _SENT:
            found = self._sender(packet.uid, five_tuple.protocol, source, destination, packet.outdev)
        elif packet.hook in _RECEIVED:
            found = self._questions.owner(five_tuple.protocol, destination, source, packet.indev)
            if found is not None and not found.connected and _is_for_many(five_tuple.dst):
                # Each socket of the port gets it.
                found = self._only(found, destination, sends=False)
        else:
            return None
        if found is None:
            return None
        cgroup = None if found.cgroup is None else self._cgroups.path(found.cgroup)
        exe = None if self._programs is None else self._programs.program(found.inode, found.cgroup)
        # One that was not accepted yet, or that only waits for late packets, says 0 in place of its user.
        return Owner(found.uid if found.inode else None, found.inode, cgroup, exe)

    def _sender(
        self, uid: int | None, protocol: int, local: tuple[bytes, int], remote: tuple[bytes, int], interface: int
    ) -> SocketOwner | None:
        """The socket that a packet was sent from. uid: of its sender, if that is known.

        The kernel is asked for the socket that would get an answer. Any user may send datagrams from the address of another's
        socket (IP_PKTINFO in ip(7)), or share its port (SO_REUSEADDR, SO_REUSEPORT in socket(7)).
        """
        found = self._questions.owner(protocol, local, remote, interface)
        uid = uid if self._compares_users else None
        if found is None or (found.connected and uid in (None, found.uid)):
            return found
        return None if found.connected or protocol != IPPROTO_UDP else self._only(found, local, sends=True, uid=uid)

    def _only(self, found: SocketOwner, local: tuple[bytes, int], sends: bool, uid: int | None = None) -> SocketOwner | None:
        """The socket, if all that share its port belong to one user and control group. uid: others than its are left out.

        sends: those count that may have sent the packet, else those that receive it.
        """
        sharing = self._questions.sharing(local, sends)
        if sharing is None:
            return None
        mine = [each for each in sharing if uid in (None, each.uid)]
        if len({(each.uid, each.cgroup) for each in mine}) != 1:
            return None
        return found if any(each.inode == found.inode for each in mine) else mine[0]


def _is_for_many(address: bytes) -> bool:
    """Whether an address is a group's, or all of a network's (255.255.255.255)."""
    first = address[0]
    return first == 0xFF if len(address) == 16 else 224 <= first < 240 or address == b"\xff\xff\xff\xff"


def _in_first_user_namespace() -> bool:
    try:
        return Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"]
    except OSError:
        return False
