"""The keys of QUIC's Initial packets (RFC 9001 5). They take AES, hence the `cryptography` package.

Loaded where flows are read, and not where a protocol is only named: the package takes 6 MB of memory.
"""

from __future__ import annotations

import hmac
from hashlib import sha256

try:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
except ImportError:  # without it a flow is QUIC and has no name
    AVAILABLE = False
else:
    AVAILABLE = True


def _expand(secret: bytes, label: bytes, size: int) -> bytes:
    """HKDF-Expand-Label with an empty context and at most one block (RFC 8446 7.1, RFC 5869 2.3)."""
    label = b"tls13 " + label
    info = size.to_bytes(2, "big") + bytes((len(label),)) + label + b"\0"
    return hmac.digest(secret, info + b"\1", "sha256")[:size]


class InitialKeys:
    """The client's Initial keys (RFC 9001 5.2). salt, labels: of the version. destination: the connection id."""

    __slots__ = ("_aead", "_iv", "_mask")

    def __init__(self, salt: bytes, labels: tuple[bytes, bytes, bytes], destination: bytes) -> None:
        secret = _expand(hmac.new(salt, destination, sha256).digest(), b"client in", 32)
        key, iv, protection = labels
        self._aead = AESGCM(_expand(secret, key, 16))
        self._iv = int.from_bytes(_expand(secret, iv, 12), "big")
        # One block of AES, as the RFC requires for header protection: nothing is secret here.
        self._mask = Cipher(algorithms.AES(_expand(secret, protection, 16)), modes.ECB())  # RFC 9001 5.4.3

    def unseal(self, datagram: bytes, start: int, at: int, end: int) -> bytes | None:
        """The frames of a packet, or None where these are not its keys (RFC 9001 5.3, 5.4).

        start: of the packet. at: of its number. end: behind the payload.
        """
        mask = self._mask.encryptor().update(datagram[at + 4 : at + 20])
        first = datagram[start] ^ mask[0] & 0x0F
        size = (first & 3) + 1
        number = int.from_bytes(datagram[at : at + size], "big") ^ int.from_bytes(mask[1 : 1 + size], "big")
        header = bytes((first,)) + datagram[start + 1 : at] + number.to_bytes(size, "big")
        nonce = (self._iv ^ number).to_bytes(12, "big")
        try:
            return self._aead.decrypt(nonce, datagram[at + size : end], header)
        except InvalidTag:
            return None
