"""A DNS answer rewritten: the same ID and question, other records (RFC 1035 4.1, RFC 6891, RFC 7830 for padding)."""

from __future__ import annotations

from collections.abc import Sequence
from struct import pack, unpack_from
from typing import Final

from nfq_agent.protocols.dns import name

_A, _AAAA, _OPT, _ANY = 1, 28, 41, 255
# Where the question's name stands, as every answer points to it.
_OWNER: Final = b"\xc0\x0c"
# An OPT record without options, and the head of one of its options.
_OPT_BYTES: Final = 11
_OPTION_BYTES: Final = 4
_PADDING: Final = 12
# The TTL of the records that are put in.
_SECONDS: Final = 60
_RECORDS: Final = 256


def rewritten(message: bytes, addresses: Sequence[bytes], rcode: int, size: int | None) -> bytes | None:
    """The answer with these records instead of its own; None where that cannot be done.

    addresses: packed; those of the type that was asked for are answered. rcode: 0, or 3 for a name that does not exist. size: of
    the message, to be kept as it is by padding; None if it may change.
    """
    asked = name(message, 12, strict=False)
    if asked is None or len(message) < asked[1] + 4:
        return None
    end = asked[1] + 4
    kind, _ = unpack_from("!HH", message, asked[1])
    wanted = {_A: (4,), _AAAA: (16,), _ANY: (4, 16)}.get(kind, ())
    found = [] if rcode else [each for each in addresses if len(each) in wanted]
    records = [_OWNER + pack("!HHIH", _A if len(each) == 4 else _AAAA, 1, _SECONDS, len(each)) + each for each in found]
    opt = _opt(message, end)
    if size is not None:
        while records and not _fits(size - end - sum(map(len, records))):
            records.pop()
        room = size - end - sum(map(len, records))
        if not _fits(room):
            return None
        opt = _padded(opt, room)
    # AA, TC and AD are cleared: the answer is no longer the server's.
    flags = unpack_from("!H", message, 2)[0] & 0xF990 | rcode
    return message[:2] + pack("!5H", flags, 1, len(records), 0, bool(opt)) + message[12:end] + b"".join(records) + opt


def _fits(room: int) -> bool:
    return room == 0 or room == _OPT_BYTES or room >= _OPT_BYTES + _OPTION_BYTES


def _padded(opt: bytes, room: int) -> bytes:
    if room == 0:
        return b""
    head = opt[:9] if opt else b"\0" + pack("!HHI", _OPT, 1232, 0)
    data = room - _OPT_BYTES
    if data == 0:
        return head + b"\0\0"
    return head + pack("!H", data) + pack("!HH", _PADDING, data - _OPTION_BYTES) + bytes(data - _OPTION_BYTES)


def _opt(message: bytes, at: int) -> bytes:
    """The message's OPT record without its options; empty if there is none."""
    for _ in range(min(sum(unpack_from("!3H", message, 6)), _RECORDS)):
        owner = name(message, at, strict=False)
        if owner is None or len(message) < owner[1] + 10:
            return b""
        kind, size_of_udp, flags, length = unpack_from("!HHIH", message, owner[1])
        if kind == _OPT:
            return b"\0" + pack("!HHIH", _OPT, size_of_udp, flags, 0)
        at = owner[1] + 10 + length
    return b""
