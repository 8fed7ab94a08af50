"""SOCKS 4, 4a and 5: where the client asks to be connected to (RFC 1928, RFC 1929; "SOCKS: A protocol for TCP proxy", 1992).

Steps: a fixed number.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any, Final

from nfq_agent.protocols import MORE, NO, Found, Protocol, Result, text

_COMMANDS: Final = {1: "connect", 2: "bind", 3: "associate"}
_USER_LIMIT: Final = 256


def parse(client: bytes, server: bytes) -> Result:
    """socks_version, socks_command, and socks_host: the name or address that is asked for."""
    if not client:
        return MORE
    if client[0] == 4:
        return _four(client)
    return _five(client, server) if client[0] == 5 else NO


def _four(client: bytes) -> Result:
    if len(client) < 2:
        return MORE
    if client[1] not in (1, 2):
        return NO
    if len(client) < 9:
        return MORE
    end = client.find(b"\0", 8, 8 + _USER_LIMIT)
    if end < 0:
        return MORE if len(client) < 8 + _USER_LIMIT else NO
    facts: dict[str, Any] = {"protocol": "socks", "socks_version": "4", "socks_command": _COMMANDS[client[1]]}
    address = client[4:8]
    if address[:3] == b"\0\0\0" and address[3]:
        # 4a: the name follows the user.
        last = client.find(b"\0", end + 1, end + 1 + _USER_LIMIT)
        if last < 0:
            return MORE if len(client) < end + 1 + _USER_LIMIT else NO
        facts["socks_host"] = text(client[end + 1 : last]).lower()
    else:
        facts["socks_host"] = str(ip_address(address))
    return Found(facts)


def _five(client: bytes, server: bytes) -> Result:
    if len(client) < 2 or len(client) < 2 + client[1]:
        return MORE if len(client) < 2 or client[1] else NO
    at = 2 + client[1]
    # The server has chosen a method before the client says more.
    if not client[1] or (server and server[0] != 5):
        return NO
    facts: dict[str, Any] = {"protocol": "socks", "socks_version": "5"}
    if client[at : at + 1] == b"\1":
        # User and password; neither is reported.
        name = at + 2 + client[at + 1] if len(client) > at + 1 else len(client)
        at = name + 1 + client[name] if len(client) > name else len(client)
    if len(client) < at + 5:
        return Found(facts, decided=False) if len(client) <= at or client[at] == 5 else NO
    version, command, _, kind = client[at : at + 4]
    size = {1: 4, 3: 1 + client[at + 4], 4: 16}.get(kind)
    if version != 5 or command not in _COMMANDS or size is None:
        return NO
    if len(client) < at + 4 + size + 2:
        return Found(facts, decided=False)
    host = client[at + 4 : at + 4 + size]
    facts |= {
        "socks_command": _COMMANDS[command],
        "socks_host": text(host[1:]).lower() if kind == 3 else str(ip_address(host)),
    }
    return Found(facts)


PROTOCOL: Final = Protocol(
    "socks",
    facts=("socks_version", "socks_command", "socks_host"),
    headline="socks_host",
    hosts=("socks_host",),
    parse=parse,
)
