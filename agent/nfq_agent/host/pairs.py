"""Makes veth pairs, finds them by their alias, and removes them (rtnetlink(7)). Writing takes CAP_NET_ADMIN."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import struct
import time
from typing import Final
from zlib import crc32

from nfq_agent.host.attributes import attribute
from nfq_agent.host.jail.fixed import FixedMessages
from nfq_agent.host.links import Link, links
from nfq_agent.host.rtnetlink import CREATE_EXCLUSIVE, REQUEST, Rtnetlink, by_type, message, nested

# linux/rtnetlink.h, linux/if_link.h, linux/veth.h
_RTM_NEWLINK: Final = 16
_RTM_DELLINK: Final = 17
_RTM_GETLINK: Final = 18
_IFNAME: Final = 3
_MTU: Final = 4
_QDISC: Final = 6
_LINKINFO: Final = 18
_IFALIAS: Final = 20
_AF_SPEC: Final = 26
_INFO_KIND: Final = 1
_INFO_DATA: Final = 2
_VETH_PEER: Final = 1
_ADDR_GEN_MODE: Final = 8
_NO_ADDRESS: Final = 1
_UP_NOARP: Final = 0x81
_IFINFO: Final = struct.Struct("=BxHiII")
# The largest MTU that a veth takes: a frame of any interface fits.
_LONGEST: Final = 65535
# How long a pair may take until it carries frames, in seconds.
_PATIENCE: Final = 10.0
_STEP: Final = 0.002
ALIAS: Final = "nfq-agent:"
_NAME: Final = re.compile("nfq[0-9a-f]{10}[ab]")


class PairSocket(Rtnetlink):
    """Makes and removes pairs."""

    def make_pair(self, first: str, second: str, alias: str) -> tuple[int, int]:
        """Make a pair, up, without ARP and without an IPv6 address, that carries frames; the indices of both ends.

        Raises OSError: EEXIST; ETIMEDOUT if it does not carry frames.
        """
        peer = _IFINFO.pack(0, 0, 0, 0, 0) + _named(second)
        data = nested(_INFO_DATA, nested(_VETH_PEER, peer))
        info = nested(_LINKINFO, attribute(_INFO_KIND, b"veth") + data)
        self.ask(_RTM_NEWLINK, CREATE_EXCLUSIVE, _IFINFO.pack(0, 0, 0, 0, 0) + _named(first) + info)
        try:
            ends = socket.if_nametoindex(first), socket.if_nametoindex(second)
            quiet = nested(_AF_SPEC, nested(socket.AF_INET6, attribute(_ADDR_GEN_MODE, bytes((_NO_ADDRESS,)))))
            for index in ends:
                said = attribute(_IFALIAS, alias.encode())
                self.ask(_RTM_NEWLINK, 0, _IFINFO.pack(0, 0, index, 0, 0) + said)
                # A kernel without IPv6 does not have the attribute that switches it off.
                with contextlib.suppress(OSError):
                    self.ask(_RTM_NEWLINK, 0, _IFINFO.pack(0, 0, index, 0, 0) + quiet)
            for index in ends:
                self.ask(_RTM_NEWLINK, 0, _IFINFO.pack(0, 0, index, _UP_NOARP, _UP_NOARP))
            for index in ends:
                self._wait_until_active(index)
        except BaseException:
            self.remove(socket.if_nametoindex(first))
            raise
        return ends

    def _wait_until_active(self, index: int) -> None:
        """Wait: the kernel activates an interface that was up before its carrier later, in a work item (net/core/link_watch.c).

        Frames that are sent before that are lost. Raises OSError.
        """
        until = time.monotonic() + _PATIENCE
        while by_type(self.get(_RTM_GETLINK, _IFINFO.pack(0, 0, index, 0, 0))[_IFINFO.size :]).get(_QDISC) == b"noop\0":
            if time.monotonic() > until:
                raise OSError(errno.ETIMEDOUT, f"{os.strerror(errno.ETIMEDOUT)}: interface {index} is not active")
            time.sleep(_STEP)

    def remove(self, index: int) -> None:
        """Remove an interface, and with it the other end of a pair. A missing one is not an error."""
        with contextlib.suppress(OSError):
            self.ask(_RTM_DELLINK, 0, _IFINFO.pack(0, 0, index, 0, 0))


class Removal:
    """The removal of one interface, which a worker can send when it may send nothing else over netlink."""

    def __init__(self, index: int) -> None:
        """index: of the interface. Raises OSError."""
        body = _IFINFO.pack(0, 0, index, 0, 0)
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._fixed = FixedMessages([[message(_RTM_DELLINK, REQUEST, body)]])

    @property
    def headers(self) -> tuple[int, int, int]:
        """Where the message's header is (FixedMessages.headers)."""
        return self._fixed.headers

    def fileno(self) -> int:
        """The descriptor."""
        return self._socket.fileno()

    def send(self) -> None:
        """Remove the interface, and with it the other end of a pair. One that is gone is not an error."""
        with contextlib.suppress(OSError):
            self._fixed.send(self._socket.fileno(), 0, None)


def names(owner: str) -> tuple[str, str]:
    """What the ends of an owner's pair are called: `nfq`, a hash of the instance, one of the name, and a letter."""
    beginning = _beginning(owner)
    return f"{beginning}a", f"{beginning}b"


def _beginning(owner: str) -> str:
    """What the names of an owner's interfaces begin with."""
    _, instance, name = owner.split(":", 2)
    return f"nfq{_hash(instance)}{_hash(name) if name else ''}"


def _hash(text: str) -> str:
    return f"{crc32(text.encode()) & 0xFFFFF:05x}"


def is_end(link: Link) -> bool:
    """Whether an interface is an end of a pair of any agent, by its alias, or by its name where no alias was set yet."""
    return link.kind == "veth" and (link.alias.startswith(ALIAS) or (not link.alias and _NAME.fullmatch(link.name) is not None))


def belongs(alias: str, owner: str) -> bool:
    """Whether an alias is this owner's: the same, or, where the owner ends with a colon, one that begins with it."""
    return alias == owner or (owner.endswith(":") and alias.startswith(owner))


def sweep(owner: str) -> int:
    """Remove the pairs that belong to an owner (`belongs`), left by a killed agent. Returns how many."""
    beginning = _beginning(owner)
    found = {
        link.index: link.peer
        for link in links()
        if is_end(link) and (belongs(link.alias, owner) or (not link.alias and link.name.startswith(beginning)))
    }
    if not found:
        return 0
    with PairSocket() as writer:
        for index in found:
            writer.remove(index)
    return max(1, len(found) // 2)


def _named(name: str) -> bytes:
    return attribute(_IFNAME, name.encode() + b"\0") + attribute(_MTU, struct.pack("=I", _LONGEST))
