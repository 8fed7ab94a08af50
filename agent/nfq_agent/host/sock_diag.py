"""Questions to the kernel over netlink: which socket a connection belongs to, which others share its port, and whether an address
is this host's.

Each costs one message to the kernel and one back (10 to 20 us; sockets that share a port 20 us for each family). Source:
sock_diag(7), rtnetlink(7).
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

from nfq_agent.host.jail.calls import Sends
from nfq_agent.host.jail.fixed import FixedMessages
from nfq_agent.host.rtnetlink import messages

# linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h, linux/rtnetlink.h
_NETLINK_SOCK_DIAG: Final = 4
_NLM_F_REQUEST: Final = 1
_NLM_F_DUMP: Final = 0x300
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_SOCK_DIAG_BY_FAMILY: Final = 20
_INET_DIAG_SKV6ONLY: Final = 11
_INET_DIAG_MARK: Final = 15
_INET_DIAG_CGROUP_ID: Final = 21
_RTM_GETROUTE: Final = 26
_RTA_DST: Final = 1
_RTN_LOCAL: Final = 2
_ALL_STATES: Final = 0xFFFFFFFF
_NO_COOKIE: Final = 0xFFFFFFFF
_HEADER: Final = struct.Struct("=IHHII")
# struct inet_diag_req_v2 without its socket id; the id; and the end of struct inet_diag_msg: expires, rqueue, wqueue, uid, inode.
_ASK: Final = struct.Struct("=BBBBI")
_ID: Final = struct.Struct("!HH16s16s")
_ID_END: Final = struct.Struct("=III")
_STATE: Final = struct.Struct("=BBBB")
_END: Final = struct.Struct("=IIIII")
_ANSWER: Final = _STATE.size + _ID.size + _ID_END.size + _END.size
_ATTRIBUTE: Final = struct.Struct("=HH")
_ROUTE: Final = struct.Struct("=BBBBBBBBI")
_SOCKET: Final = _ASK.size + _ID.size + _ID_END.size
# Kind, flags and length of each question: a socket, the route to an IPv4 and to an IPv6 address, all sockets with a port.
_QUESTIONS: Final = (
    (_SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, _SOCKET),
    (_RTM_GETROUTE, _NLM_F_REQUEST, _ROUTE.size + _ATTRIBUTE.size + 4),
    (_RTM_GETROUTE, _NLM_F_REQUEST, _ROUTE.size + _ATTRIBUTE.size + 16),
    (_SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST | _NLM_F_DUMP, _SOCKET),
)
# net/tcp_states.h: a UDP socket that is not connected.
_CLOSE: Final = 7
_MAPPED: Final = bytes(10) + b"\xff\xff"
# Messages that are read for one question about a port: some thousand sockets.
_MOST: Final = 32


@dataclass(frozen=True, slots=True)
class SocketOwner:
    """A socket of this host. uid: of its creator. mark: of its packets. cgroup: the id of its control group (version 2).

    mark and cgroup are None if the kernel does not report them. connected: it has one other end; not known of a listener of TCP.
    """

    uid: int
    inode: int
    mark: int | None
    cgroup: int | None = None
    connected: bool = True


class KernelQuestions:
    """The netlink sockets of one process. If one cannot be opened, its question is answered with "not known"."""

    def __init__(self, routes: bool = True, ports: bool = False) -> None:
        """routes: `is_local` is asked. ports: `sharing` is asked."""
        self._diag = _open(_NETLINK_SOCK_DIAG)
        self._route = _open(socket.NETLINK_ROUTE) if routes else None
        # Of its own: an answer that is not read to its end delays no exact question.
        self._ports = _open(_NETLINK_SOCK_DIAG) if ports else None
        # A process that may only send these questions cannot change anything through the same sockets.
        self._questions = FixedMessages(
            [_HEADER.pack(_HEADER.size + length, kind, flags, 0, 0), length] for kind, flags, length in _QUESTIONS
        )

    @property
    def sends(self) -> Sends:
        """Each socket with the questions that are sent on it."""
        start, _, step = self._questions.headers
        places = ((self._diag, 0, 1), (self._route, 1, 3), (self._ports, 3, 4))
        return tuple(
            (frozenset((each.fileno(),)), (start + first * step, start + end * step, step))
            for each, first, end in places
            if each is not None
        )

    def _ask(self, sock: socket.socket, question: int, body: bytes) -> bytes | None:
        """The body of the kernel's one answer; None if it is an error."""
        try:
            self._questions.send(sock.fileno(), question, body)
            answer = sock.recv(8192)
        except OSError:
            return None
        if len(answer) < _HEADER.size:
            return None
        length, got, *_ = _HEADER.unpack_from(answer)
        return None if got == _NLMSG_ERROR else answer[_HEADER.size : length]

    def close(self) -> None:
        """Close them."""
        for each in (self._diag, self._route, self._ports):
            if each is not None:
                each.close()

    def socket_of(self, local: tuple[str, int], remote: tuple[str, int]) -> SocketOwner | None:
        """The TCP socket of this network namespace that has these ends; None if there is none, or it is not known."""
        ends = _packed(local[0]), _packed(remote[0])
        if len(ends[0]) != len(ends[1]):
            return None
        return self.owner(socket.IPPROTO_TCP, (ends[0], local[1]), (ends[1], remote[1]))

    def owner(self, protocol: int, local: tuple[bytes, int], remote: tuple[bytes, int], interface: int = 0) -> SocketOwner | None:
        """The same for TCP and UDP, by packed addresses. A socket that listens or is not connected is found, too.

        interface: the index of the one that the packet comes in or leaves by; without it no socket is found that is bound to one.
        """
        if self._diag is None or protocol not in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
            return None
        family = socket.AF_INET6 if len(local[0]) == 16 else socket.AF_INET
        # For UDP the kernel takes the ends in the other order (udp_dump_one() in net/ipv4/udp_diag.c).
        (first, sport), (second, dport) = (local, remote) if protocol == socket.IPPROTO_TCP else (remote, local)
        ends = _ID.pack(sport, dport, first.ljust(16, b"\0"), second.ljust(16, b"\0"))
        body = _ASK.pack(family, protocol, 0, 0, _ALL_STATES) + ends + _ID_END.pack(interface, _NO_COOKIE, _NO_COOKIE)
        answer = self._ask(self._diag, 0, body)
        return None if answer is None or len(answer) < _ANSWER else _owner(answer)

    def sharing(self, local: tuple[bytes, int], sends: bool) -> list[SocketOwner] | None:
        """The UDP sockets of a port that may have sent a datagram from an address; else those that get what is for many there.

        None if they are not known. Any socket of the port may send: also one that is bound to another address (IP_PKTINFO in
        ip(7)), and one that is connected. IPv4: those of IPv6 that take IPv4 as well belong to them.
        """
        address, port = local
        families = (socket.AF_INET6,) if len(address) == 16 else (socket.AF_INET, socket.AF_INET6)
        found = []
        for family in families:
            answers = self._dump(family, port, _ALL_STATES if sends else 1 << _CLOSE)
            if answers is None:
                return None
            found += [_owner(answer) for answer in answers if _takes_part(answer, family, address, sends)]
        return found

    def _dump(self, family: int, port: int, states: int) -> list[bytes] | None:
        """The UDP sockets of one family and port in these states; None if they are not known, or too many."""
        if self._ports is None:
            return None
        ends = _ID.pack(port, 0, bytes(16), bytes(16))
        body = _ASK.pack(family, socket.IPPROTO_UDP, 0, 0, states) + ends + _ID_END.pack(0, _NO_COOKIE, _NO_COOKIE)
        try:
            # The rest of an earlier answer; while there is one, the kernel takes no question (EBUSY).
            self._read(self._ports)
            self._questions.send(self._ports.fileno(), 3, body)
            return self._read(self._ports)
        except OSError:
            return None

    @staticmethod
    def _read(sock: socket.socket) -> list[bytes] | None:
        """The bodies of an answer in many parts; None if it is longer than _MOST messages, or an error. Raises OSError."""
        found: list[bytes] = []
        for _ in range(_MOST):
            try:
                data = sock.recv(1 << 16)
            except BlockingIOError:
                return None
            for kind, body in messages(data):
                if kind == _NLMSG_DONE:
                    return found
                if kind == _NLMSG_ERROR:
                    return None
                found.append(body)
        return None

    def is_local(self, host: str) -> bool | None:
        """Whether the routing table has an address as one of this host's; None where it is not known.

        Not by bind(2): with ip_nonlocal_bind = 1 every address can be bound.
        """
        address = ip_address(host.partition("%")[0])
        if address.is_unspecified or address.is_loopback:
            return True
        if self._route is None:
            return None
        raw = address.packed
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        body = (
            _ROUTE.pack(family, len(raw) * 8, 0, 0, 0, 0, 0, 0, 0) + _ATTRIBUTE.pack(_ATTRIBUTE.size + len(raw), _RTA_DST) + raw
        )
        answer = self._ask(self._route, 1 if address.version == 4 else 2, body)
        # No route: not an address of this host.
        return answer is not None and len(answer) >= _ROUTE.size and _ROUTE.unpack_from(answer)[7] == _RTN_LOCAL


def _open(protocol: int) -> socket.socket | None:
    try:
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        # The kernel answers within the call that asks: nothing is waited for.
        sock.setblocking(False)
    except OSError:
        return None
    return sock


def _owner(answer: bytes) -> SocketOwner:
    """What the kernel says about a socket: struct inet_diag_msg and attributes."""
    *_, uid, inode = _END.unpack_from(answer, _ANSWER - _END.size)
    rest = answer[_ANSWER:]
    mark, cgroup = _number(rest, _INET_DIAG_MARK, "=I"), _number(rest, _INET_DIAG_CGROUP_ID, "=Q")
    return SocketOwner(uid, inode, mark, cgroup, answer[1] != _CLOSE)


def _takes_part(answer: bytes, family: int, address: bytes, anywhere: bool) -> bool:
    """Whether a UDP socket of a family has to do with packets of this address, by what it is bound to.

    anywhere: what it is bound to does not count, only whether it takes addresses of this size.
    """
    if len(answer) < _ANSWER:
        return False
    bound: bytes = _ID.unpack_from(answer, _STATE.size)[2]
    if family == socket.AF_INET:
        return anywhere or bound[:4] in (bytes(4), address)
    if len(address) == 16:
        return anywhere or bound in (bytes(16), address)
    takes_both = not _number(answer[_ANSWER:], _INET_DIAG_SKV6ONLY, "=B")
    return takes_both and (anywhere or bound in (bytes(16), _MAPPED + address))


def _number(attributes: bytes, wanted: int, layout: str) -> int | None:
    """The attribute of a kind as a number; None if it is missing."""
    form = struct.Struct(layout)
    at = 0
    while at + _ATTRIBUTE.size <= len(attributes):
        length, kind = _ATTRIBUTE.unpack_from(attributes, at)
        if length < _ATTRIBUTE.size:
            return None
        if kind == wanted and length >= _ATTRIBUTE.size + form.size:
            return int(form.unpack_from(attributes, at + _ATTRIBUTE.size)[0])
        at += (length + 3) & ~3
    return None


def _packed(host: str) -> bytes:
    return ip_address(host.partition("%")[0]).packed
