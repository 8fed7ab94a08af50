"""The policy routing that TPROXY needs: marked packets are this host's own, whatever their destination.

One rule and one route a family, both with our protocol number and in a table of the instance's own; nothing else is
touched. Written over rtnetlink(7), which needs CAP_NET_ADMIN.
"""

from __future__ import annotations

import errno
import socket
import struct
import sys
import zlib
from collections.abc import Mapping, Set
from typing import Final

from nfq_agent.host.attributes import attribute
from nfq_agent.host.families import ADDRESS_FAMILIES, families
from nfq_agent.host.rtnetlink import CREATE_EXCLUSIVE, CREATE_REPLACE, Rtnetlink, by_type
from nfq_agent.mark import Mark
from nfq_agent.rules.model import Family, RuleError

# The origin of a rule or a route (rtm_protocol, linux/rtnetlink.h): no routing daemon uses this number.
PROTOCOL: Final = 221
# Before the rule of the table `main`, which is at 32766.
_PRIORITY: Final = 15002

# linux/rtnetlink.h, linux/fib_rules.h
_NEW_ROUTE, _DEL_ROUTE, _GET_ROUTE = 24, 25, 26
_NEW_RULE, _DEL_RULE, _GET_RULE = 32, 33, 34
_RTA_OIF, _RTA_TABLE = 4, 15
_FRA_PRIORITY, _FRA_FWMARK, _FRA_TABLE, _FRA_FWMASK, _FRA_PROTOCOL = 6, 10, 15, 16, 21
_LOCAL, _SCOPE_HOST, _TO_TABLE = 2, 254, 1
# struct rtmsg, and struct fib_rule_hdr, which has the same fields in other words.
_ROUTE: Final = struct.Struct("=BBBBBBBBI")
# The answers of a kernel that has no such table, no policy routing, or no such family.
_NOTHING: Final = (errno.ENOENT, errno.EAFNOSUPPORT, errno.EOPNOTSUPP)


def table_of(instance: str) -> int:
    """The number of an instance's routing table, by its name."""
    return 0x4E460000 | zlib.crc32(instance.encode()) & 0xFFFF


def ensure(instance: str, marks: Mapping[Family, Set[Mark]]) -> None:
    """Make the rules and routes of an instance those for `marks`, and remove any other of its own. Raises RuleError."""
    table = table_of(instance)
    with _Routing() as routing:
        for family in families():
            missing = set(marks.get(family, ()))
            existing = routing.rules(family, table)
            if missing:
                routing.change(_NEW_ROUTE, family, _local_route(family, table), CREATE_REPLACE)
            else:
                for route in routing.routes(family, table):
                    routing.change(_DEL_ROUTE, family, route)
            for mark in existing:
                if mark in missing:
                    missing.remove(mark)
                else:
                    routing.change(_DEL_RULE, family, _rule(family, mark, table))
            for mark in sorted(missing, key=str):
                routing.change(_NEW_RULE, family, _rule(family, mark, table), CREATE_EXCLUSIVE)


def sweep(instance: str) -> bool:
    """Remove what an instance left here. Returns True if there was anything. Raises RuleError."""
    table = table_of(instance)
    with _Routing() as routing:
        if not any(routing.rules(family, table) or routing.routes(family, table) for family in families()):
            return False
    ensure(instance, {})
    return True


class _Routing:
    """The kernel's routing. Its methods raise RuleError."""

    def __enter__(self) -> _Routing:
        try:
            # Strict: there may be very many routes in other tables.
            self._rtnetlink = Rtnetlink(strict=True)
        except OSError as error:
            raise RuleError(f"the kernel's routing cannot be read: {error.strerror or error}") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._rtnetlink.close()

    def rules(self, family: Family, table: int) -> list[Mark]:
        """The marks that rules of ours lead to a table."""
        rules = map(_numbers, self._dump(_GET_RULE, family, b"", "rules"))
        # With FRA_PROTOCOL of one byte; a mask of all bits is given too.
        ours = (rule for rule in rules if (rule.get(_FRA_TABLE), rule.get(_FRA_PROTOCOL)) == (table, PROTOCOL))
        return [Mark(rule.get(_FRA_FWMARK, 0), rule.get(_FRA_FWMASK, 0xFFFFFFFF)) for rule in ours]

    def routes(self, family: Family, table: int) -> list[bytes]:
        """The routes of ours in a table, each as the message that deletes it."""
        wanted = ADDRESS_FAMILIES[family], PROTOCOL
        return [
            route
            for route in self._dump(_GET_ROUTE, family, attribute(_RTA_TABLE, struct.pack("=I", table)), "routes")
            if _numbers(route).get(_RTA_TABLE) == table and (route[0], _ROUTE.unpack_from(route)[5]) == wanted
        ]

    def change(self, kind: int, family: Family, body: bytes, flags: int = 0) -> None:
        """Add or delete one rule or route."""
        try:
            self._rtnetlink.ask(kind, flags, body)
        except OSError as error:
            what = "rule" if kind in (_NEW_RULE, _DEL_RULE) else "route"
            verb = "added" if kind in (_NEW_RULE, _NEW_ROUTE) else "deleted"
            raise RuleError(
                f"the routing {what} of {family} that TPROXY needs cannot be {verb}: {error.strerror or error}"
            ) from error

    def _dump(self, kind: int, family: Family, condition: bytes, what: str) -> list[bytes]:
        try:
            return self._rtnetlink.dump(kind, _ROUTE.pack(ADDRESS_FAMILIES[family], 0, 0, 0, 0, 0, 0, 0, 0) + condition)
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
    return {kind: int.from_bytes(value, sys.byteorder) for kind, value in by_type(body[_ROUTE.size :]).items()}
