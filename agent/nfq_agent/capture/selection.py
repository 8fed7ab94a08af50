"""Which interfaces and ports a tap or an inline link takes, and the classic filter that gives the ports to the kernel.

Values only: nothing here opens a socket.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from struct import Struct
from typing import Final

from nfq_agent.packet import TCP, UDP, FiveTuple

# linux/filter.h, linux/bpf_common.h: struct sock_filter, and the instructions in use.
_INSTRUCTION: Final = Struct("=HBBI")
_LOAD_HALF: Final = 0x28  # BPF_LD | BPF_H | BPF_ABS
_LOAD_BYTE: Final = 0x30  # BPF_LD | BPF_B | BPF_ABS
_LOAD_HALF_X: Final = 0x48  # BPF_LD | BPF_H | BPF_IND
_LOAD_BYTE_X: Final = 0x50  # BPF_LD | BPF_B | BPF_IND
_LOAD_MEMORY: Final = 0x60  # BPF_LD | BPF_MEM
_STORE: Final = 0x02  # BPF_ST
_SHIFT_LEFT: Final = 0x64  # BPF_ALU | BPF_LSH | BPF_K
_ADD: Final = 0x04  # BPF_ALU | BPF_ADD | BPF_K
_ADD_X: Final = 0x0C  # BPF_ALU | BPF_ADD | BPF_X
_X_FROM_A: Final = 0x07  # BPF_MISC | BPF_TAX
_X_IMMEDIATE: Final = 0x01  # BPF_LDX | BPF_IMM
_X_HEADER: Final = 0xB1  # BPF_LDX | BPF_MSH | BPF_B: 4 * (the byte's low half)
_IF_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_IF_ABOVE: Final = 0x25  # BPF_JMP | BPF_JGT | BPF_K
_IF_LEAST: Final = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_IF_SET: Final = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_JUMP: Final = 0x05  # BPF_JMP | BPF_JA
_RETURN: Final = 0x06  # BPF_RET | BPF_K

_ETHERNET: Final = 14
_IPV4: Final = 0x0800
_IPV6: Final = 0x86DD
_TAGS: Final = (0x8100, 0x88A8)
# IPv6 extension headers whose length is in their second byte: hop-by-hop, routing, destination options, mobility, HIP, Shim6.
# The filter reads at most three of them in a packet.
_EXTENSIONS: Final = (0, 43, 60, 135, 139, 140)
_MOST_EXTENSIONS: Final = 3
# Fragment and AH: the filter does not read these.
_UNREAD: Final = (44, 51)

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class CaptureSelection:
    """interfaces, exclude: names or shell patterns. tcp, udp: ranges of ports with both ends in them; none at all: all."""

    interfaces: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    tcp: tuple[Range, ...] = ()
    udp: tuple[Range, ...] = ()

    @property
    def everything(self) -> bool:
        """True if no port is named: all IP packets of any protocol are taken."""
        return not (self.tcp or self.udp)

    def chooses(self, name: str) -> bool:
        """Whether the interface is one of these."""
        return any(fnmatchcase(name, each) for each in self.interfaces) and not any(
            fnmatchcase(name, each) for each in self.exclude
        )

    def takes(self, five_tuple: FiveTuple) -> bool:
        """Whether either port of a packet is one of these."""
        if self.everything:
            return True
        ranges = {TCP: self.tcp, UDP: self.udp}.get(five_tuple.protocol, ())
        ports = (five_tuple.sport, five_tuple.dport)
        return any(port is not None and first <= port <= last for first, last in ranges for port in ports)


def classic_filter(selection: CaptureSelection, snap: int) -> bytes:
    """The program for SO_ATTACH_FILTER: it returns the bytes to copy, 0 for what is not chosen.

    snap: bytes to copy, from the Ethernet header on. It passes what it cannot read to the end (tags in the frame, later
    fragments, in IPv6 all fragments, AH and more than three extension headers); the reader looks at those again. Source:
    networking/filter.rst of the kernel.
    """
    take = _INSTRUCTION.pack(_RETURN, 0, 0, snap)
    leave = _INSTRUCTION.pack(_RETURN, 0, 0, 0)
    tagged = b"".join(_INSTRUCTION.pack(_IF_EQUAL, 0, 1, tag) + take for tag in _TAGS)
    kind = _INSTRUCTION.pack(_LOAD_HALF, 0, 0, 12)
    if selection.everything:
        known = b"".join(_INSTRUCTION.pack(_IF_EQUAL, 0, 1, each) + take for each in (_IPV4, _IPV6))
        return kind + known + tagged + leave
    ports = _ports(selection, take) + leave
    # In IPv4 a later fragment has no ports: it is taken. X: bytes of the header.
    v4 = (
        _INSTRUCTION.pack(_LOAD_HALF, 0, 0, _ETHERNET + 6)
        + _INSTRUCTION.pack(_IF_SET, 0, 1, 0x1FFF)
        + take
        + _INSTRUCTION.pack(_X_HEADER, 0, 0, _ETHERNET)
        + _INSTRUCTION.pack(_LOAD_BYTE, 0, 0, _ETHERNET + 9)
    ) + ports
    # X: where the transport header begins, A: its protocol. Every host sends listener reports (MLD), which have an extension
    # header: if the filter let them pass, a full ring would count them as lost.
    v6 = (
        _INSTRUCTION.pack(_X_IMMEDIATE, 0, 0, 40)
        + _INSTRUCTION.pack(_LOAD_BYTE, 0, 0, _ETHERNET + 6)
        + _extension() * _MOST_EXTENSIONS
        + b"".join(_INSTRUCTION.pack(_IF_EQUAL, 0, 1, each) + take for each in (*_EXTENSIONS, *_UNREAD))
    ) + ports
    return kind + tagged + _when(_IPV4, v4) + _when(_IPV6, v6) + leave


def _extension() -> bytes:
    """Skip one extension header, if there is one. A: the protocol of the header that begins at X."""
    skip = (
        _INSTRUCTION.pack(_LOAD_BYTE_X, 0, 0, _ETHERNET)
        + _INSTRUCTION.pack(_STORE, 0, 0, 0)
        + _INSTRUCTION.pack(_LOAD_BYTE_X, 0, 0, _ETHERNET + 1)
        + _INSTRUCTION.pack(_SHIFT_LEFT, 0, 0, 3)
        + _INSTRUCTION.pack(_ADD, 0, 0, 8)
        + _INSTRUCTION.pack(_ADD_X, 0, 0, 0)
        + _INSTRUCTION.pack(_X_FROM_A, 0, 0, 0)
        + _INSTRUCTION.pack(_LOAD_MEMORY, 0, 0, 0)
    )
    *others, last = _EXTENSIONS
    found = b"".join(_INSTRUCTION.pack(_IF_EQUAL, len(others) - place, 0, each) for place, each in enumerate(others))
    return found + _INSTRUCTION.pack(_IF_EQUAL, 0, len(skip) // _INSTRUCTION.size, last) + skip


def _when(value: int, block: bytes) -> bytes:
    """The block that runs if A is the value, and is skipped otherwise.

    A conditional jump reaches 255 instructions, so it is a long one.
    """
    return _INSTRUCTION.pack(_IF_EQUAL, 1, 0, value) + _INSTRUCTION.pack(_JUMP, 0, 0, len(block) // _INSTRUCTION.size) + block


def _ports(selection: CaptureSelection, take: bytes) -> bytes:
    """With the protocol in A and the header's length in X: return if either port is chosen, else continue after this."""
    blocks: list[bytes] = []
    for protocol, ranges in ((TCP, selection.tcp), (UDP, selection.udp)):
        if ranges:
            one_end = b"".join(_within(*each, take) for each in ranges)
            both = b"".join(_INSTRUCTION.pack(_LOAD_HALF_X, 0, 0, _ETHERNET + offset) + one_end for offset in (0, 2))
            blocks.append(_when(protocol, both + _INSTRUCTION.pack(_RETURN, 0, 0, 0)))
    return b"".join(blocks)


def _within(first: int, last: int, take: bytes) -> bytes:
    return _INSTRUCTION.pack(_IF_LEAST, 0, 2, first) + _INSTRUCTION.pack(_IF_ABOVE, 1, 0, last) + take
