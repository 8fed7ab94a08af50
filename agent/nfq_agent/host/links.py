"""Network interfaces as the kernel lists them, and the messages about those that appear, change and disappear (rtnetlink(7)).

It only reads.
"""

from __future__ import annotations

import errno
import socket
import struct
from dataclasses import dataclass
from typing import Final

from nfq_agent.host.attributes import attribute
from nfq_agent.host.rtnetlink import Rtnetlink, by_type, dump, messages

# linux/rtnetlink.h, linux/if_link.h
_RTM_NEWLINK: Final = 16
_RTM_DELLINK: Final = 17
_RTM_GETLINK: Final = 18
_RTMGRP_LINK: Final = 1
_IFLA_IFNAME: Final = 3
_IFLA_MTU: Final = 4
_IFLA_LINK: Final = 5
_IFLA_MASTER: Final = 10
_IFLA_LINKINFO: Final = 18
_IFLA_INFO_KIND: Final = 1
_IFLA_IFALIAS: Final = 20
_IFLA_LINK_NETNSID: Final = 37
_IFLA_XDP: Final = 43
_IFLA_XDP_ATTACHED: Final = 2
_RTM_GETNSID: Final = 90
_NETNSA_NSID: Final = 1
_NETNSA_FD: Final = 3
_IFF_UP: Final = 1
# linux/if_arp.h
_ETHERNET: Final = 1
_LOOPBACK: Final = 772
_IFINFO: Final = struct.Struct("=BxHiII")
_BUFFER: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class Link:
    """One interface.

    index, name, mtu. kind: "veth", "bridge", ...; empty for a device without a kind. up: administratively. alias: its ifalias.
    peer: index of the other end of a veth pair, in the namespace `netns` (the kernel's id for it here), None in this one.
    master: index of the bridge or bond that it is a port of, 0 for none. xdp: an XDP program is attached. hardware: its
    type in linux/if_arp.h.
    """

    index: int
    name: str
    kind: str
    mtu: int
    up: bool
    alias: str
    peer: int
    netns: int | None
    master: int
    xdp: bool
    hardware: int = _ETHERNET

    @property
    def ethernet(self) -> bool:
        """Whether its frames begin with an Ethernet header; on a tunnel (tun, WireGuard, GRE) they are IP packets alone."""
        return self.hardware in (_ETHERNET, _LOOPBACK)

    @property
    def loopback(self) -> bool:
        """Whether it leads back to the host itself."""
        return self.hardware == _LOOPBACK


class Links:
    """A netlink socket that reads all interfaces and then receives changes. Needs no capability."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        try:
            # Before it is bound, so that no change is missed between the listing and the first event.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
            self._socket.bind((0, _RTMGRP_LINK))
            self._socket.setblocking(False)
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """Readable when an interface has changed."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def changes(self) -> list[tuple[Link, bool]] | None:
        """The interfaces that changed since the last call, each with True if it is gone.

        None: messages were lost; list them all.
        """
        found: list[tuple[Link, bool]] = []
        while True:
            try:
                data = self._socket.recv(1 << 18)
            except BlockingIOError:
                return found
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    return None
                raise
            for kind, body in messages(data):
                if kind in (_RTM_NEWLINK, _RTM_DELLINK) and (link := _link(body)) is not None:
                    found.append((link, kind == _RTM_DELLINK))


def links() -> list[Link]:
    """All interfaces of this network namespace. Raises OSError."""
    return [link for body in dump(_RTM_GETLINK, _IFINFO.pack(socket.AF_UNSPEC, 0, 0, 0, 0)) if (link := _link(body)) is not None]


def namespace_id(descriptor: int) -> int | None:
    """The number that this network namespace has for another one (RTM_GETNSID); None if it has none. Raises OSError."""
    # struct rtgenmsg, padded.
    request = bytes(4) + attribute(_NETNSA_FD, struct.pack("=I", descriptor))
    with Rtnetlink() as rtnetlink:
        answer = rtnetlink.get(_RTM_GETNSID, request)
    number = int.from_bytes(by_type(answer[4:]).get(_NETNSA_NSID, b"\xff" * 4), "little", signed=True)
    return None if number < 0 else number


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")


def _link(body: bytes) -> Link | None:
    if len(body) < _IFINFO.size:
        return None
    family, hardware, index, flags, _ = _IFINFO.unpack_from(body)
    # A bridge reports its ports in messages of its own family.
    if family != socket.AF_UNSPEC:
        return None
    found = by_type(body[_IFINFO.size :])
    info = by_type(found.get(_IFLA_LINKINFO, b""))
    xdp = by_type(found.get(_IFLA_XDP, b""))
    netns = found.get(_IFLA_LINK_NETNSID)
    return Link(
        index=index,
        name=_text(found.get(_IFLA_IFNAME, b"")),
        kind=_text(info.get(_IFLA_INFO_KIND, b"")),
        mtu=_number(found.get(_IFLA_MTU, b"")),
        up=bool(flags & _IFF_UP),
        alias=_text(found.get(_IFLA_IFALIAS, b"")),
        peer=_number(found.get(_IFLA_LINK, b"")),
        netns=None if netns is None else int.from_bytes(netns, "little", signed=True),
        master=_number(found.get(_IFLA_MASTER, b"")),
        xdp=any(xdp.get(_IFLA_XDP_ATTACHED, b"\0")),
        hardware=hardware,
    )


def _number(value: bytes) -> int:
    return int.from_bytes(value[:4], "little")
