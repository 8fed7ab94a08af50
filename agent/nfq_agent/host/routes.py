"""The policy routing that TPROXY needs: marked packets are this host's own, whatever their destination.

One rule and one route a family, both with our protocol number and in a table of the instance's own; nothing else is
touched. Written over rtnetlink(7), which needs CAP_NET_ADMIN.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import suppress
from typing import Final, TypeVar

from nfq_agent.host.families import ADDRESS_FAMILIES, families
from nfq_agent.host.nftables.netlink import attribute, attributes
from nfq_agent.mark import Mark
from nfq_agent.rules.model import Family, RuleError

# The origin of a rule or a route (rtm_protocol, linux/rtnetlink.h): no routing daemon uses this number.
PROTOCOL: Final = 221
# Before the rule of the table `main`, which is at 32766.
_PRIORITY: Final = 15002

# linux/rtnetlink.h, linux/fib_rules.h, linux/netlink.h
_NEW_ROUTE, _DEL_ROUTE, _GET_ROUTE = 24, 25, 26
_NEW_RULE, _DEL_RULE, _GET_RULE = 32, 33, 34
_REQUEST, _ACK, _REPLACE, _EXCLUSIVE, _CREATE, _DUMP = 1, 4, 0x100, 0x200, 0x400, 0x300
_ERROR, _DONE = 2, 3
_RTA_OIF, _RTA_TABLE = 4, 15
_FRA_PRIORITY, _FRA_FWMARK, _FRA_TABLE, _FRA_FWMASK, _FRA_PROTOCOL = 6, 10, 15, 16, 21
_LOCAL, _SCOPE_HOST, _TO_TABLE = 2, 254, 1
_SOL_NETLINK: Final = 270
_STRICT_CHECK: Final = 12
# struct nlmsghdr; struct rtmsg, and struct fib_rule_hdr, which has the same fields in other words.
_HEADER: Final = struct.Struct("=IHHII")
_ROUTE: Final = struct.Struct("=BBBBBBBBI")
# What a kernel answers that has no such table, or no policy routing, or no such family.
_NOTHING: Final = (errno.ENOENT, errno.EAFNOSUPPORT, errno.EOPNOTSUPP)

_Found = TypeVar("_Found")


def table_of(instance: str) -> int:
    """The number of an instance's routing table, by its name."""
    return 0x4E460000 | zlib.crc32(instance.encode()) & 0xFFFF


def ensure(instance: str, marks: Mapping[Family, Set[Mark]]) -> None:
    """Make the rules and routes of an instance those for `marks`, and remove any other of its own. Raises RuleError."""
    table = table_of(instance)
    with _Netlink() as netlink:
        for family in families():
            missing = set(marks.get(family, ()))
            there = netlink.rules(family, table)
            if missing:
                netlink.change(_NEW_ROUTE, family, _local_route(family, table), _CREATE | _REPLACE)
            else:
                for route in netlink.routes(family, table):
                    netlink.change(_DEL_ROUTE, family, route)
            for mark in there:
                if mark in missing:
                    missing.remove(mark)
                else:
                    netlink.change(_DEL_RULE, family, _rule(family, mark, table))
            for mark in sorted(missing, key=str):
                netlink.change(_NEW_RULE, family, _rule(family, mark, table), _CREATE | _EXCLUSIVE)


def sweep(instance: str) -> bool:
    """Remove what an instance left here. Returns True if there was anything. Raises RuleError."""
    table = table_of(instance)
    with _Netlink() as netlink:
        if not any(netlink.rules(family, table) or netlink.routes(family, table) for family in families()):
            return False
    ensure(instance, {})
    return True


class _Netlink:
    """One socket to the kernel's routing. Its methods raise RuleError."""

    def __enter__(self) -> _Netlink:
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        except OSError as error:
            raise RuleError(f"the kernel's routing cannot be read: {error.strerror or error}") from error
        self._socket.settimeout(10)
        with suppress(OSError):
            # It then gives the routes of one table only: there may be very many in the others.
            self._socket.setsockopt(_SOL_NETLINK, _STRICT_CHECK, 1)
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def rules(self, family: Family, table: int) -> list[Mark]:
        """The marks that rules of ours lead to a table."""

        def mark(body: bytes) -> Mark | None:
            found = _numbers(body)
            # With FRA_PROTOCOL of one byte; a mask of all bits is given too.
            ours = found.get(_FRA_TABLE) == table and found.get(_FRA_PROTOCOL) == PROTOCOL
            return Mark(found.get(_FRA_FWMARK, 0), found.get(_FRA_FWMASK, 0xFFFFFFFF)) if ours else None

        return self._dump(_GET_RULE, family, b"", mark, "rules")

    def routes(self, family: Family, table: int) -> list[bytes]:
        """The routes of ours in a table, each as the message that deletes it."""

        def route(body: bytes) -> bytes | None:
            ours = _numbers(body).get(_RTA_TABLE) == table and _ROUTE.unpack_from(body)[5] == PROTOCOL
            return body if ours and body[0] == ADDRESS_FAMILIES[family] else None

        return self._dump(_GET_ROUTE, family, attribute(_RTA_TABLE, struct.pack("=I", table)), route, "routes")

    def change(self, kind: int, family: Family, body: bytes, flags: int = 0) -> None:
        """Add or delete one rule or route."""
        try:
            self._socket.send(_HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | _ACK | flags, 1, 0) + body)
            for answer, content in _messages(self._socket.recv(1 << 16)):
                if answer == _ERROR:
                    _raise(content)
        except OSError as error:
            what = "rule" if kind in (_NEW_RULE, _DEL_RULE) else "route"
            verb = "added" if kind in (_NEW_RULE, _NEW_ROUTE) else "deleted"
            raise RuleError(
                f"the routing {what} of {family} that TPROXY needs cannot be {verb}: {error.strerror or error}"
            ) from error

    def _dump(
        self, kind: int, family: Family, condition: bytes, found: Callable[[bytes], _Found | None], what: str
    ) -> list[_Found]:
        body = _ROUTE.pack(ADDRESS_FAMILIES[family], 0, 0, 0, 0, 0, 0, 0, 0) + condition
        made: list[_Found] = []
        try:
            self._socket.send(_HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | _DUMP, 1, 0) + body)
            while True:
                for answer, content in _messages(self._socket.recv(1 << 18)):
                    if answer in (_ERROR, _DONE):
                        _raise(content)
                        return made
                    if (each := found(content)) is not None:
                        made.append(each)
        except OSError as error:
            if error.errno in _NOTHING:
                return []
            raise RuleError(f"the routing {what} of {family} cannot be read: {error.strerror or error}") from error


def _local_route(family: Family, table: int) -> bytes:
    """All addresses are local (`local default dev lo`)."""
    header = _ROUTE.pack(ADDRESS_FAMILIES[family], 0, 0, 0, 0, PROTOCOL, _SCOPE_HOST, _LOCAL, 0)
    interface = struct.pack("=I", socket.if_nametoindex("lo"))
    return header + attribute(_RTA_OIF, interface) + attribute(_RTA_TABLE, struct.pack("=I", table))


def _rule(family: Family, mark: Mark, table: int) -> bytes:
    values = ((_FRA_PRIORITY, _PRIORITY), (_FRA_FWMARK, mark.value), (_FRA_FWMASK, mark.mask), (_FRA_TABLE, table))
    header = _ROUTE.pack(ADDRESS_FAMILIES[family], 0, 0, 0, 0, 0, 0, _TO_TABLE, 0)
    numbers = b"".join(attribute(kind, struct.pack("=I", value)) for kind, value in values)
    return header + numbers + attribute(_FRA_PROTOCOL, bytes((PROTOCOL,)))


def _numbers(body: bytes) -> dict[int, int]:
    """The attributes of a rule or a route, as far as they are numbers of this machine's byte order."""
    return {kind: int.from_bytes(value, sys.byteorder) for kind, value in attributes(body[_ROUTE.size :])}


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    place = 0
    while place + _HEADER.size <= len(data):
        size, kind, *_ = _HEADER.unpack_from(data, place)
        yield kind, data[place + _HEADER.size : place + size]
        place += size + 3 & ~3


def _raise(content: bytes) -> None:
    """Raise the error that a message carries, if it is one. An end of a dump carries 0, or an error too."""
    if len(content) >= 4 and (code := -int.from_bytes(content[:4], sys.byteorder, signed=True)):
        raise OSError(code, os.strerror(code))
