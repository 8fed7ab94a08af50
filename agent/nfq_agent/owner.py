"""Who a flow belongs to: the user of its socket, and the unit or container of the socket's control group. Values only.

The names in a path are those of systemd (cg_path_get_unit() in src/basic/cgroup-util.c), and of the runtimes of containers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from nfq_agent.packet import Packet

_UNIT: Final = re.compile(r".+\.(service|scope|socket|mount|swap|timer|path)")
# docker-ID.scope, libpod-ID.scope, cri-containerd-ID.scope, crio-ID.scope; ID alone in a folder of docker or kubepods.
_ID: Final = re.compile(r"(?:docker-|libpod-|cri-containerd-|crio-)?([0-9a-f]{64})(?:\.scope)?")
_NAMED: Final = (
    re.compile(r"systemd-nspawn@(.+)\.service"),
    re.compile(r"machine-(.+)\.scope"),
    re.compile(r"lxc\.payload\.(.+)"),
)
# What is below it was named by that user.
_OF_A_USER: Final = re.compile(r"user@[0-9]+\.service")
# How much of an id people see.
_SHORT: Final = 12


@dataclass(frozen=True)
class Owner:
    """Who has a socket. uid: of its creator. inode: its number. cgroup: the path of its control group. None: not known.

    exe: the path of the program that has it, if it was asked for and is known.
    """

    uid: int | None
    inode: int
    cgroup: str | None = None
    exe: str | None = None

    @cached_property
    def unit(self) -> str | None:
        """The systemd unit; None outside of one, and where it is not known."""
        for part in (self.cgroup or "").strip("/").split("/"):
            name = part.removeprefix("_")
            if name.endswith(".slice"):
                continue
            return _unescaped(name) if _UNIT.fullmatch(name) else None
        return None

    @cached_property
    def container(self) -> str | None:
        """The container: its name where the path has one, else the first 12 digits of its id; None outside of one.

        A name below the group of a user's services counts for nothing: any user may make a group of any name there.
        """
        parts = (self.cgroup or "").strip("/").split("/")
        users = next((place for place, part in enumerate(parts) if _OF_A_USER.fullmatch(part)), len(parts))
        for place in range(len(parts) - 1, -1, -1):
            if match := _ID.fullmatch(parts[place]):
                return match[1][:_SHORT]
            for named in _NAMED if place < users else ():
                if match := named.fullmatch(parts[place]):
                    return _unescaped(match[1])
        return None

    @property
    def facts(self) -> dict[str, Any]:
        r"""What is known, by the names of the conditions of a policy and of a filter. uid: a number, the others: texts.

        In a name that is not UTF-8 the other bytes stand as `\xff`: a user may choose it, and it has no form in JSON.
        """
        names = {"unit": self.unit, "container": self.container, "cgroup": self.cgroup, "exe": self.exe}
        known: dict[str, Any] = {key: _readable(name) for key, name in names.items() if name is not None}
        return known if self.uid is None else {**known, "uid": self.uid}


class Owners:
    """Finds the owner of a packet's flow. This one knows of none."""

    def names(self, packet: Packet) -> Mapping[str, Any]:
        """Unit, container, control group, program and user of the socket on this host, as far as they are known."""
        del packet
        return {}

    def known(self, packet: Packet) -> Mapping[str, Any]:
        """The same, as far as it is known without asking the kernel: the container behind a packet's interface."""
        del packet
        return {}


def _readable(name: str) -> str:
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _unescaped(name: str) -> str:
    r"""A name as systemd escapes it: `\x2d` for a hyphen (systemd-escape(1))."""
    return re.sub(r"\\x([0-9a-f]{2})", lambda match: chr(int(match[1], 16)), name)
