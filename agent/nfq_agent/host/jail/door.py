"""Confines a process: first by Landlock (files), then by a seccomp filter (system calls).

After that it works with the descriptors that it has open. No code in the process can undo this.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Final

from nfq_agent.host.jail import landlock, seccomp
from nfq_agent.host.jail.calls import ProcessNeeds, filter_of
from nfq_agent.host.jail.syscalls import this_architecture

# Read late by Python and the C library: the time zone.
_ALWAYS_READ: Final = ("/etc/localtime", "/usr/share/zoneinfo")


def missing() -> list[str]:
    """What this host lacks to confine a process, in words; empty if nothing."""
    return [what for what in (seccomp.missing(), landlock.missing()) if what is not None]


def means() -> list[str]:
    """What this host has, in words: `seccomp`, `Landlock 7`."""
    found = [] if seccomp.missing() else ["seccomp"]
    if landlock.missing() is None:
        found.append(f"Landlock {landlock.version()}")
    return found


def close(needs: ProcessNeeds) -> None:
    """Confine this process with what the host has. Raises OSError if the kernel refuses what it says it has.

    Code that Python imports late stays readable: the folders of sys.path.
    """
    _load_what_is_late()
    held = _held()
    needs = replace(needs, open_now=_open() - {number for number, family in _sockets() if family == socket.AF_PACKET})
    seccomp.no_new_privileges()
    if landlock.missing() is None:
        landlock.restrict((*_ALWAYS_READ, *_code_folders(), *needs.reads), needs.writes)
    architecture = this_architecture()
    if architecture is not None and seccomp.missing() is None:
        seccomp.load(filter_of(architecture, needs, held))


def _load_what_is_late() -> None:
    """Make the C library load now what it would load at first use."""
    time.localtime()


def _code_folders() -> Iterable[str]:
    return [folder for folder in sys.path if folder.startswith("/") and folder != "/"]


def _held() -> list[int]:
    """The sockets to the kernel or to other processes of this host. They stay open: their numbers do not come again."""
    return [number for number, family in _sockets() if family not in (socket.AF_INET, socket.AF_INET6)]


def _sockets() -> Iterator[tuple[int, int]]:
    """The sockets that are open, with their families."""
    for number in _open():
        with contextlib.suppress(OSError):
            end = socket.socket(fileno=number)
            family = end.family
            end.detach()
            yield number, family


def _open() -> frozenset[int]:
    """The descriptors that are open, without the one that this list is read by."""
    found = set()
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            os.fstat(number)
            found.add(number)
    return frozenset(found)
