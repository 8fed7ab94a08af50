"""Which process holds a netlink socket of this network namespace, by its port id.

A port id is a process id in the PID namespace of the process that opened the socket (netlink(7)): for a socket of a container it
names no process of this host, or another one. The inode of the socket tells.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_NETLINK_NETFILTER: Final = 12


def holders(port: int) -> list[int]:
    """The processes that hold the netfilter socket with this port id; none where they cannot be seen from here."""
    inode = _inode(port)
    return [] if inode is None else [pid for pid in _processes() if _has_open(pid, f"socket:[{inode}]")]


def described(port: int) -> str:
    """The holders as text for a message."""
    found = holders(port)
    if not found:
        return f"a process that cannot be seen from here, as one of a container (netlink port {port})"
    return ", ".join(f"{_name(pid)} (pid {pid}{_elsewhere(pid)})" for pid in found)


def _inode(port: int) -> int | None:
    """Of the socket. Columns: address, protocol, port id, ..., inode (netlink_native_seq_show(), net/netlink/af_netlink.c)."""
    try:
        lines = Path("/proc/self/net/netlink").read_text().splitlines()[1:]
    except OSError:
        return None
    for line in lines:
        words = line.split()
        if (int(words[1]), int(words[2])) == (_NETLINK_NETFILTER, port):
            return int(words[-1])
    return None


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _has_open(pid: int, link: str) -> bool:
    try:
        with os.scandir(f"/proc/{pid}/fd") as entries:
            return any(os.readlink(entry.path) == link for entry in entries)
    except OSError:
        return False


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_bytes().decode(errors="backslashreplace").strip()
    except OSError:
        return "a process"


def _elsewhere(pid: int) -> str:
    """Which PID namespace it lives in, if that is not ours."""
    try:
        theirs, ours = (os.readlink(f"/proc/{each}/ns/pid") for each in (pid, "self"))
    except OSError:
        return ""
    return "" if theirs == ours else f", in another PID namespace, {theirs}"
