"""Which process may ask the running agent for what: by the user and the groups that the kernel names for its end."""

from __future__ import annotations

import grp
import os
import socket
import struct
from array import array
from typing import Final

# Members of this group may ask for the status (and change nothing).
READERS: Final = "nfq-agent"
# Members of this one may ask for flows too: addresses and names that were seen in traffic.
FLOW_READERS: Final = "nfq-agent-flows"
# The questions that every client of the socket may ask. All others are for root and for the agent's user.
_FOR_ALL: Final = frozenset({"ping", "status"})
_PEERCRED: Final = struct.Struct("iII")
# asm-generic/socket.h; Python has no name for it. It fails with ERANGE for a process with more groups than fit.
_SO_PEERGROUPS: Final = 59
_GROUPS: Final = 1024


def group_id(name: str) -> int | None:
    """The id of a group; None where there is no such group."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None


def refusal(end: socket.socket, verb: object) -> str:
    """Why the process at the other end may not ask this; empty if it may."""
    pid, uid, gid = _PEERCRED.unpack(end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))
    if verb in _FOR_ALL or uid in (0, os.geteuid()):
        return ""
    if verb == "flows":
        if (readers := group_id(FLOW_READERS)) is not None and (readers == gid or readers in _groups(end)):
            return ""
        return f"{verb!r} is for root and members of group {FLOW_READERS}, and process {pid} has uid {uid}"
    return f"{verb!r} is for root, and process {pid} has uid {uid}"


def _groups(end: socket.socket) -> array[int]:
    """The supplementary groups that the process had when it connected; none if there are too many."""
    try:
        return array("I", end.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS))
    except OSError:
        return array("I")
