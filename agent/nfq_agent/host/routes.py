"""The policy routing that TPROXY needs: marked packets are this host's own, whatever their destination.

One rule and one route a family, both with our protocol number and in a table of the instance's own; nothing else is
touched. Written with ip(8), which needs CAP_NET_ADMIN.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import zlib
from collections.abc import Mapping, Set
from typing import Any, Final

from nfq_agent.mark import Mark
from nfq_agent.rules.model import FAMILIES, Family, RuleError

# The origin of a rule or a route (rtm_protocol, linux/rtnetlink.h): no routing daemon uses this number.
PROTOCOL: Final = 221
_FLAGS: Final[Mapping[Family, str]] = {"inet": "-4", "inet6": "-6"}
# Before the rule of the table `main`, which is at 32766.
_PRIORITY: Final = 15002


def table_of(instance: str) -> int:
    """The number of an instance's routing table, by its name."""
    return 0x4E460000 | zlib.crc32(instance.encode()) & 0xFFFF


def ensure(instance: str, marks: Mapping[Family, Set[Mark]]) -> None:
    """Make the rules and routes of an instance those for `marks`, and remove any other of its own. Raises RuleError."""
    if not any(marks.values()) and shutil.which("ip") is None:
        # No other program writes them.
        return
    table = str(table_of(instance))
    for family in FAMILIES:
        missing = set(marks.get(family, ()))
        there = _rules(family, table)
        if missing:
            _ip(family, "route", "replace", "local", "default", "dev", "lo", "table", table, "protocol", str(PROTOCOL))
        elif there or _routes(family, table):
            _ip(family, "route", "flush", "table", table, "protocol", str(PROTOCOL))
        for found in there:
            mark = _mark(found)
            if mark in missing:
                missing.remove(mark)
            else:
                _rule(family, "del", mark, table)
        for mark in sorted(missing, key=str):
            _rule(family, "add", mark, table)


def sweep(instance: str) -> bool:
    """Remove what an instance left here. Returns True if there was anything. Raises RuleError.

    Without ip(8) there is nothing: no other program writes it.
    """
    table = str(table_of(instance))
    if shutil.which("ip") is None or not any(_rules(family, table) or _routes(family, table) for family in FAMILIES):
        return False
    ensure(instance, {})
    return True


def _rules(family: Family, table: str) -> list[dict[str, Any]]:
    rules = json.loads(_ip(family, "-j", "-N", "rule", "show") or "[]")
    return [rule for rule in rules if str(rule.get("table")) == table and str(rule.get("protocol")) == str(PROTOCOL)]


def _routes(family: Family, table: str) -> list[Any]:
    # A table that was never written to is an error to ip(8), not an empty answer.
    routes: list[Any] = json.loads(_ip(family, "-j", "-N", "route", "show", "table", "all", "protocol", str(PROTOCOL)) or "[]")
    return [route for route in routes if str(route.get("table")) == table]


def _mark(rule: Mapping[str, Any]) -> Mark:
    # ip(8) leaves a full mask out.
    return Mark(int(rule.get("fwmark", "0"), 0), int(rule.get("fwmask", "0xffffffff"), 0))


def _rule(family: Family, change: str, mark: Mark, table: str) -> None:
    where = ["priority", str(_PRIORITY), "fwmark", str(mark), "lookup", table, "protocol", str(PROTOCOL)]
    _ip(family, "rule", change, *where)


def _ip(family: Family, *words: str) -> str:
    command = ["ip", _FLAGS[family], *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuleError(f"{' '.join(command)}: {error}") from error
    if done.returncode != 0:
        raise RuleError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout
