"""Run a command for which the kernel has neither sockets nor settings of IPv6, as one that was booted with `ipv6.disable=1`.

argv: the command. Root; its mounts are its own.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import sys
from pathlib import Path

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_CLONE_NEWNS, _MS_BIND, _MS_PRIVATE = 0x20000, 0x1000, 0x44000
_SETTINGS = Path("/proc/sys/net")
_RET_ERRNO, _RET_ALLOW = 0x00050000, 0x7FFF0000
# __NR_socket
_SOCKET = {"x86_64": 41, "aarch64": 198}[os.uname().machine]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _mount(libc: ctypes.CDLL, source: str, target: Path, kind: str, flags: int) -> None:
    if libc.mount(source.encode(), bytes(target), kind.encode(), flags, None):
        raise OSError(ctypes.get_errno(), f"mount {target}")


def hide_settings(libc: ctypes.CDLL) -> None:
    """Put a folder with all settings but those of IPv6 over that of the kernel. _MS_PRIVATE: MS_PRIVATE and MS_REC (mount(2))."""
    if libc.unshare(_CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    _mount(libc, "none", Path("/"), "none", _MS_PRIVATE)
    others = {each: os.open(each, os.O_PATH) for each in _SETTINGS.iterdir() if each.name != "ipv6"}
    folders = {each for each in others if each.is_dir()}
    _mount(libc, "tmpfs", _SETTINGS, "tmpfs", 0)
    for each, place in others.items():
        if each in folders:
            each.mkdir()
        else:
            each.touch()
        _mount(libc, f"/proc/self/fd/{place}", each, "none", _MS_BIND)
        os.close(place)


def main() -> None:
    """seccomp(2): of struct seccomp_data, the number of the system call is at 0 and its first argument at 16."""
    instructions = (
        (0x20, 0, 0, 0), (0x15, 0, 3, _SOCKET), (0x20, 0, 0, 16), (0x15, 0, 1, socket.AF_INET6),
        (0x06, 0, 0, _RET_ERRNO | errno.EAFNOSUPPORT), (0x06, 0, 0, _RET_ALLOW),
    )  # fmt: skip
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in instructions))
    program = _Program(len(instructions), ctypes.cast(code, ctypes.c_void_p))
    libc = ctypes.CDLL(None, use_errno=True)
    hide_settings(libc)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "seccomp")
    os.execvp(sys.argv[1], sys.argv[1:])


main()
