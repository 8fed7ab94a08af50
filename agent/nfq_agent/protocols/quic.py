"""QUIC: Initial packets and the ClientHello in them (RFC 9000 17.2.2, RFC 9001 5 and appendix A; version 2: RFC 9369).

An Initial packet's keys follow from what stands in it, so anyone on the path may read it; that takes AES, hence the
`cryptography` package. Steps: at most 4 packets for a datagram, and 256 frames for a packet, where a run of
padding is one.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final, NamedTuple

from nfq_agent.protocols import Protocol, tls
from nfq_agent.reassembly import Reassembly

try:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
except ImportError:  # without it a flow is QUIC and has no name
    AVAILABLE = False
else:
    AVAILABLE = True

_PACKETS: Final = 4
_FRAMES: Final = 256
_PADDING: Final = 0
_PING: Final = 1
_ACK: Final = 2
_ACK_ECN: Final = 3
_CRYPTO: Final = 6
# A client's Initial datagram has 1,200 bytes or more, its first destination id 8 or more (RFC 9000 14.1, 7.2).
_DATAGRAM: Final = 1200


class _Version(NamedTuple):
    name: str
    salt: bytes
    labels: tuple[bytes, bytes, bytes]
    # The two bits of the first byte that mean Initial.
    initial: int


_V1_LABELS: Final = (b"quic key", b"quic iv", b"quic hp")
_VERSIONS: Final = {
    1: _Version("1", bytes.fromhex("38762cf7f55934b34d179ae6a4c80cadccbb7f0a"), _V1_LABELS, 0),
    0x6B3343CF: _Version(
        "2", bytes.fromhex("0dede3def700a6db819381be6e269dcbf9bd2ed9"), (b"quicv2 key", b"quicv2 iv", b"quicv2 hp"), 1
    ),
    # The drafts that were in wide use; 29 to 32 share a salt (draft-ietf-quic-tls-29 5.2).
    **{
        0xFF000000 + number: _Version(f"draft-{number}", bytes.fromhex("afbfec289993d24c9e9786f19c6111e04390a899"), _V1_LABELS, 0)
        for number in range(29, 33)
    },
}


@dataclass(frozen=True, slots=True)
class Initial:
    """An Initial packet in its datagram. start: of the packet. number_at: of the packet number. end: behind the payload."""

    version: int
    destination: bytes
    start: int
    number_at: int
    end: int


class Hello:
    """The ClientHello of one connection, put together from its client's Initial packets. Bounded by its Reassembly.

    facts: what is known so far, or empty. complete: nothing more is to come.
    """

    __slots__ = ("_keys", "_stream", "complete", "facts")

    def __init__(self) -> None:
        self._keys: list[_Keys] = []
        self._stream = Reassembly(0)
        self.facts: dict[str, Any] = {}
        self.complete = False

    @property
    def held(self) -> int:
        """Bytes kept now."""
        return self._stream.held

    @property
    def conflict(self) -> bool:
        """True where two frames differ about the same byte."""
        return self._stream.conflict

    def add(self, datagram: bytes) -> bool:
        """Take a datagram of the client. True if it was QUIC and said something new."""
        new = False
        for packet in initials(datagram):
            version = _VERSIONS[packet.version].name
            if not AVAILABLE:
                self.facts = {"protocol": "quic", "quic_version": version}
                return True
            frames = self._decrypt(datagram, packet)
            if frames is None:
                continue
            new = new or not self.facts
            self.facts = {"protocol": "quic", "quic_version": version}
            for offset, data in _crypto(frames):
                self._stream.add(offset, data)
            self._read()
        return new or self.complete

    def _decrypt(self, datagram: bytes, packet: Initial) -> bytes | None:
        # The keys come from the first destination id; after a Retry, from the one that the server chose.
        for keys in self._keys:
            if (frames := keys.unseal(datagram, packet)) is not None:
                return frames
        if len(self._keys) == 2 or (len(packet.destination) < 8 and not self._keys):
            return None
        keys = _Keys(_VERSIONS[packet.version], packet.destination)
        frames = keys.unseal(datagram, packet)
        if frames is not None:
            self._keys.append(keys)
        return frames

    def _read(self) -> None:
        data = self._stream.data
        if len(data) < 4:
            return
        size = int.from_bytes(data[1:4], "big")
        if data[0] != 1 or len(data) < 4 + size:
            return
        facts = tls.hello(data[4 : 4 + size], "q")
        self.complete = True
        if facts is not None:
            self.facts |= facts


def initials(datagram: bytes) -> list[Initial]:
    """The Initial packets of a client's datagram; empty if it is none, by header and length (RFC 9000 17.2)."""
    found: list[Initial] = []
    if len(datagram) < _DATAGRAM:
        return found
    start = 0
    for _ in range(_PACKETS):
        if len(datagram) < start + 7 or datagram[start] & 0xC0 != 0xC0:
            break
        number = int.from_bytes(datagram[start + 1 : start + 5], "big")
        version = _VERSIONS.get(number)
        if version is None:
            break
        at = start + 5
        size = datagram[at]
        destination = datagram[at + 1 : at + 1 + size]
        at += 1 + size
        if size > 20 or at >= len(datagram):
            break
        at += 1 + datagram[at]
        kind = datagram[start] >> 4 & 3
        if kind == version.initial:
            got = _variable(datagram, at)
            if got is None:
                break
            at = got[1] + got[0]
        got = _variable(datagram, at)
        # Packet number and sample need 20 bytes (RFC 9001 5.4.2).
        if got is None or got[0] < 20 or got[1] + got[0] > len(datagram):
            break
        length, at = got
        if kind == version.initial:
            found.append(Initial(number, destination, start, at, at + length))
        start = at + length
    return found


def _variable(data: bytes, at: int) -> tuple[int, int] | None:
    """A variable-length integer (RFC 9000 16): its value, and the place behind it."""
    if at >= len(data):
        return None
    size = 1 << (data[at] >> 6)
    if at + size > len(data):
        return None
    return int.from_bytes(data[at : at + size], "big") & (1 << 8 * size - 2) - 1, at + size


def _expand(secret: bytes, label: bytes, size: int) -> bytes:
    """HKDF-Expand-Label with an empty context and at most one block (RFC 8446 7.1, RFC 5869 2.3)."""
    label = b"tls13 " + label
    info = size.to_bytes(2, "big") + bytes((len(label),)) + label + b"\0"
    return hmac.digest(secret, info + b"\1", "sha256")[:size]


class _Keys:
    """The client's Initial keys (RFC 9001 5.2)."""

    __slots__ = ("_aead", "_iv", "_mask")

    def __init__(self, version: _Version, destination: bytes) -> None:
        secret = _expand(hmac.new(version.salt, destination, sha256).digest(), b"client in", 32)
        key, iv, protection = version.labels
        self._aead = AESGCM(_expand(secret, key, 16))
        self._iv = int.from_bytes(_expand(secret, iv, 12), "big")
        # One block of AES, as the RFC wants it for header protection: nothing is kept secret by it here.
        self._mask = Cipher(algorithms.AES(_expand(secret, protection, 16)), modes.ECB())  # RFC 9001 5.4.3

    def unseal(self, datagram: bytes, packet: Initial) -> bytes | None:
        """The frames of a packet, or None where these are not its keys (RFC 9001 5.3, 5.4)."""
        at = packet.number_at
        mask = self._mask.encryptor().update(datagram[at + 4 : at + 20])
        first = datagram[packet.start] ^ mask[0] & 0x0F
        size = (first & 3) + 1
        number = int.from_bytes(datagram[at : at + size], "big") ^ int.from_bytes(mask[1 : 1 + size], "big")
        header = bytes((first,)) + datagram[packet.start + 1 : at] + number.to_bytes(size, "big")
        nonce = (self._iv ^ number).to_bytes(12, "big")
        try:
            return self._aead.decrypt(nonce, datagram[at + size : packet.end], header)
        except InvalidTag:
            return None


def _crypto(frames: bytes) -> list[tuple[int, bytes]]:
    """Offset and data of the CRYPTO frames. An Initial holds no others but PADDING, PING, ACK and CLOSE (RFC 9000 12.4)."""
    found: list[tuple[int, bytes]] = []
    at = 0
    for _ in range(_FRAMES):
        if at >= len(frames):
            break
        kind = frames[at]
        at += 1
        if kind == _PADDING:
            # A run of padding is one step.
            at = len(frames) - len(frames[at:].lstrip(b"\0"))
        elif kind == _PING:
            continue
        elif kind in (_ACK, _ACK_ECN):
            after = _skip_ack(frames, at, kind)
            if after is None:
                break
            at = after
        elif kind == _CRYPTO:
            offset = _variable(frames, at)
            size = offset and _variable(frames, offset[1])
            if not offset or not size or size[1] + size[0] > len(frames):
                break
            at = size[1] + size[0]
            if offset[0] < 1 << 30:
                found.append((offset[0], frames[size[1] : at]))
        else:
            break
    return found


def _skip_ack(frames: bytes, at: int, kind: int) -> int | None:
    """The place behind an ACK frame (RFC 9000 19.3): largest, delay, count, first range, then pairs, then three ECN counts."""
    fields: list[int] = []
    wanted = 4
    while len(fields) < wanted:
        got = _variable(frames, at)
        if got is None:
            return None
        fields.append(got[0])
        at = got[1]
        if len(fields) == 3:
            wanted += 2 * min(fields[2], len(frames)) + (3 if kind == _ACK_ECN else 0)
    return at


PROTOCOL: Final = Protocol("quic", facts=("quic_version",), carries=("tls",))


__all__ = ["AVAILABLE", "PROTOCOL", "Hello", "Initial", "initials"]
