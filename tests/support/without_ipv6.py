"""Run a command for which the kernel has no sockets of IPv6, as one that was booted with `ipv6.disable=1`. argv: the command."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import sys

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_RET_ERRNO, _RET_ALLOW = 0x00050000, 0x7FFF0000
# __NR_socket
_SOCKET = {"x86_64": 41, "aarch64": 198}[os.uname().machine]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def main() -> None:
    """seccomp(2): of struct seccomp_data, the number of the system call is at 0 and its first argument at 16."""
    instructions = (
        (0x20, 0, 0, 0), (0x15, 0, 3, _SOCKET), (0x20, 0, 0, 16), (0x15, 0, 1, socket.AF_INET6),
        (0x06, 0, 0, _RET_ERRNO | errno.EAFNOSUPPORT), (0x06, 0, 0, _RET_ALLOW),
    )  # fmt: skip
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in instructions))
    program = _Program(len(instructions), ctypes.cast(code, ctypes.c_void_p))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "seccomp")
    os.execvp(sys.argv[1], sys.argv[1:])


main()
