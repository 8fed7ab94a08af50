"""Packet sockets on one interface (packet(7)): opening one takes CAP_NET_RAW, reading it no capability.

So the supervisor opens them and passes them to a worker without that capability.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from typing import Final

# linux/if_packet.h, asm-generic/socket.h
_SOL_PACKET: Final = 263
_PACKET_RX_RING: Final = 5
_PACKET_STATISTICS: Final = 6
_PACKET_VERSION: Final = 10
_TPACKET_V3: Final = 2
_SO_ATTACH_FILTER: Final = 26
_SO_LOCK_FILTER: Final = 44
_ETH_P_ALL: Final = 3
_RING: Final = struct.Struct("=IIIIIII")
_ADDRESS: Final = struct.Struct("=HHiHBB8s")
# A block holds any frame up to 64 KB with its headers; the kernel hands one over when it is full, or after this time.
BLOCK: Final = 1 << 17
RETIRE: Final = 0.04
_FRAME: Final = 2048

_libc = ctypes.CDLL(None, use_errno=True)


def _attach_filter(opened: socket.socket, program: bytes) -> None:
    """Attach a classic filter and lock it: no process with the descriptor can remove it (socket(7))."""
    code = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: number of instructions, and a pointer.
    argument = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    opened.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, argument)
    opened.setsockopt(socket.SOL_SOCKET, _SO_LOCK_FILTER, 1)


def bind(opened: socket.socket, interface: int, protocol: int = _ETH_P_ALL) -> None:
    """Bind to an interface by its index: another interface could have its name by then. Raises OSError."""
    address = _ADDRESS.pack(socket.AF_PACKET, socket.htons(protocol), interface, 0, 0, 0, b"")
    if _libc.bind(opened.fileno(), address, len(address)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def open_tap(interface: int, program: bytes, size: int) -> socket.socket:
    """A socket that sees all frames of an interface, with a ring of `size` bytes and a locked filter.

    Nothing is received before the filter is in force: the protocol is 0 until it is bound. Raises OSError: EPERM without
    CAP_NET_RAW, EAFNOSUPPORT where the kernel or the unit has no packet sockets, ENODEV, ENOMEM.
    """
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)
    try:
        opened.setsockopt(_SOL_PACKET, _PACKET_VERSION, _TPACKET_V3)
        _attach_filter(opened, program)
        blocks = blocks_of(size)
        ring = _RING.pack(BLOCK, blocks, _FRAME, BLOCK // _FRAME * blocks, round(RETIRE * 1000), 0, 0)
        opened.setsockopt(_SOL_PACKET, _PACKET_RX_RING, ring)
        bind(opened, interface)
    except BaseException:
        opened.close()
        raise
    return opened


def blocks_of(size: int) -> int:
    """How many blocks a ring of so many bytes has: at least two, so that one fills while the other is read."""
    return max(2, size // BLOCK)


def lost(opened: socket.socket) -> int:
    """Frames that passed the filter and found no room in ring or buffer, since the last call (struct tpacket_stats)."""
    try:
        data = opened.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 12)
    except OSError:
        return 0
    return int(struct.unpack_from("=II", data)[1])


def missing() -> str | None:
    """What this host or unit lacks for packet sockets, None if nothing."""
    try:
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close()
    except OSError as error:
        if error.errno == errno.EAFNOSUPPORT:
            return (
                "packet sockets: the kernel has no CONFIG_PACKET, or the unit's RestrictAddressFamilies= lacks AF_PACKET "
                "(docs/tc.md has the drop-in)"
            )
        if error.errno in (errno.EPERM, errno.EACCES):
            return "CAP_NET_RAW"
        return f"packet sockets: {error}"
    return None


# Constants for the sockets of inline links (asm-generic/socket.h, linux/if_packet.h).
_SO_RCVMARK: Final = 75
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33
_PACKET_VNET_HDR: Final = 15
_PACKET_QDISC_BYPASS: Final = 20
_PACKET_IGNORE_OUTGOING: Final = 23


def open_judged(interface: int, receive_buffer: int) -> socket.socket:
    """A socket that reads the frames of our end of a pair with their marks, uncut, and sends frames. Raises OSError."""
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)
    try:
        opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, receive_buffer)
        opened.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, receive_buffer)
        opened.setsockopt(socket.SOL_SOCKET, _SO_RCVMARK, 1)
        for option in (_PACKET_VNET_HDR, _PACKET_QDISC_BYPASS, _PACKET_IGNORE_OUTGOING):
            opened.setsockopt(_SOL_PACKET, option, 1)
        bind(opened, interface)
    except BaseException:
        opened.close()
        raise
    return opened
