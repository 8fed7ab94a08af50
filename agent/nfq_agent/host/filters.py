"""Attaches programs to interfaces as filters of a clsact qdisc (cls_bpf), for kernels without tcx links. See tc-bpf(8).

A filter outlives the process that has made it: it is found again by its name, and removed by its handle in its own preference.
The qdisc cannot carry a name and others may use it, so it is left in place.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from nfq_agent.host import bpf, pairs
from nfq_agent.host.attributes import attribute
from nfq_agent.host.links import links
from nfq_agent.host.rtnetlink import CREATE_EXCLUSIVE, Rtnetlink, by_type, dump, nested

Attach = Literal["auto", "tcx", "clsact"]

# linux/rtnetlink.h, linux/pkt_sched.h, linux/pkt_cls.h
_RTM_NEWQDISC: Final = 36
_RTM_GETQDISC: Final = 38
_RTM_NEWTFILTER: Final = 44
_RTM_DELTFILTER: Final = 45
_RTM_GETTFILTER: Final = 46
_CLSACT: Final = 0xFFFFFFF1
_CLSACT_HANDLE: Final = 0xFFFF0000
_PARENTS: Final = {bpf.TCX_INGRESS: 0xFFFFFFF2, bpf.TCX_EGRESS: 0xFFFFFFF3}
_KIND: Final = 1
_OPTIONS: Final = 2
_BPF_FD: Final = 6
_BPF_NAME: Final = 7
_BPF_FLAGS: Final = 8
# The program's return code is the verdict, as with tcx.
_DIRECT_ACTION: Final = 1
_TCMSG: Final = struct.Struct("=BxxxiIII")
# ETH_P_ALL in network byte order, which the kernel keeps in the lower half of the message's last word.
_EVERY_PROTOCOL: Final = 0x0300
_HANDLE: Final = 0x6E6671
_SYMBOLS: Final = (" cls_bpf_classify", " clsact_init")
_MODULES: Final = ("cls_bpf", "sch_ingress")


@dataclass(frozen=True, slots=True)
class Filter:
    """One filter of an interface. parent: the side. name: of a cls_bpf filter, else empty."""

    interface: int
    parent: int
    preference: int
    protocol: int
    handle: int
    name: str


def missing(attach: Attach) -> str | None:
    """What this host or unit lacks to attach programs in this way, None if nothing."""
    if attach == "tcx" or (attach == "auto" and bpf.tcx_missing() != bpf.NO_TCX):
        return bpf.missing()
    lacking = _filters_missing()
    if lacking is not None:
        return lacking if attach == "clsact" else f"{bpf.NO_TCX}, and {lacking}"
    return bpf.programs_missing()


def wanted(attach: Attach) -> bool:
    """Whether programs are attached as filters."""
    return attach == "clsact" or (attach == "auto" and bpf.tcx_missing() == bpf.NO_TCX)


def _filters_missing() -> str | None:
    """None also where that is unknown: then the first attachment shows it."""
    try:
        symbols = Path("/proc/kallsyms").read_text()
    except OSError:
        return None
    if all(symbol in symbols for symbol in _SYMBOLS):
        return None
    folder = Path("/lib/modules") / platform.release()
    modules = "".join(path.read_text() for name in ("dep", "builtin") if (path := folder / f"modules.{name}").exists())
    available = all(symbol in symbols or f"/{module}.ko" in modules for symbol, module in zip(_SYMBOLS, _MODULES, strict=True))
    return None if available else "clsact with cls_bpf (CONFIG_NET_CLS_BPF, CONFIG_NET_SCH_INGRESS)"


class Filters:
    """The filters of one owner."""

    def __init__(self, tag: str) -> None:
        """tag: the name of its filters, by which `sweep` finds them."""
        self._tag = tag
        self._ours: dict[tuple[int, int], Filter] = {}

    def attach(self, program: int, interface: int, side: int) -> int:
        """Attach before all others, unless it is attached. Returns a descriptor of the program. Raises OSError."""
        if (interface, side) not in self._ours:
            self._ours[interface, side] = self._add(program, interface, side)
        return os.dup(program)

    def _add(self, program: int, interface: int, side: int) -> Filter:
        with Rtnetlink() as writer:
            with contextlib.suppress(FileExistsError):
                writer.ask(
                    _RTM_NEWQDISC, CREATE_EXCLUSIVE,
                    _TCMSG.pack(0, interface, _CLSACT_HANDLE, _CLSACT, 0) + attribute(_KIND, b"clsact\0"),
                )  # fmt: skip
            # An egress filter of an `ingress` qdisc, which has the same handle, would be one of its ingress side.
            if not _has_clsact(interface):
                raise OSError(errno.EBUSY, "its ingress qdisc has no egress side; a clsact qdisc in its place has both")
            taken = {each.preference for each in listed(interface, side)}
            preference = next(number for number in range(1, 65536) if number not in taken)
            made = Filter(interface, _PARENTS[side], preference, _EVERY_PROTOCOL, _HANDLE, self._tag)
            options = (
                attribute(_BPF_FD, struct.pack("=I", program))
                + attribute(_BPF_NAME, self._tag.encode() + b"\0")
                + attribute(_BPF_FLAGS, struct.pack("=I", _DIRECT_ACTION))
            )
            body = attribute(_KIND, b"bpf\0") + nested(_OPTIONS, options)
            writer.ask(_RTM_NEWTFILTER, CREATE_EXCLUSIVE, _header(made) + body)
            return made

    def detach(self, interface: int) -> None:
        """Remove ours from an interface, which may be gone."""
        for key in [key for key in self._ours if key[0] == interface]:
            _remove([self._ours.pop(key)])

    def close(self) -> None:
        """Remove all."""
        _remove(list(self._ours.values()))
        self._ours.clear()

    def before_ours(self, interface: int, side: int) -> Filter | None:
        """A filter of another owner that sees packets before ours."""
        ours = self._ours.get((interface, side))
        if ours is None:
            return None
        return next((each for each in listed(interface, side) if each.preference < ours.preference), None)


def listed(interface: int, side: int) -> list[Filter]:
    """The filters of one side of an interface. Raises OSError."""
    found = []
    for body in dump(_RTM_GETTFILTER, _TCMSG.pack(0, interface, 0, _PARENTS[side], 0)):
        _, index, handle, parent, info = _TCMSG.unpack_from(body)
        members = by_type(body[_TCMSG.size :])
        name = b""
        if members.get(_KIND) == b"bpf\0":
            name = by_type(members.get(_OPTIONS, b"")).get(_BPF_NAME, b"").rstrip(b"\0")
        found.append(Filter(index, parent, info >> 16, info & 0xFFFF, handle, name.decode(errors="replace")))
    return found


def sweep(owner: str) -> int:
    """Remove the filters that belong to an owner (`pairs.belongs`), left by a killed agent. Returns how many. Raises OSError."""
    found = [
        each
        for link in links()
        for side in _PARENTS
        for each in listed(link.index, side)
        if pairs.belongs(each.name, owner) and each.handle == _HANDLE
    ]
    _remove(found)
    return len(found)


def _has_clsact(interface: int) -> bool:
    for body in dump(_RTM_GETQDISC, _TCMSG.pack(0, interface, 0, 0, 0)):
        _, index, handle, _, _ = _TCMSG.unpack_from(body)
        if (index, handle) == (interface, _CLSACT_HANDLE):
            return by_type(body[_TCMSG.size :]).get(_KIND) == b"clsact\0"
    return False


def _header(of: Filter) -> bytes:
    return _TCMSG.pack(0, of.interface, of.handle, of.parent, of.preference << 16 | of.protocol)


def _remove(filters: list[Filter]) -> None:
    if not filters:
        return
    with Rtnetlink() as writer:
        for each in filters:
            # It was removed with its interface, or by another process.
            with contextlib.suppress(OSError):
                writer.ask(_RTM_DELTFILTER, 0, _header(each) + attribute(_KIND, b"bpf\0"))
