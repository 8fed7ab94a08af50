"""What QUIC clients send first."""

from __future__ import annotations

from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.crypto import CryptoPair
from aioquic.tls import Epoch

_VERSION = 1
_CRYPTO = b"\6"


def _client(name: str) -> QuicConnection:
    client = QuicConnection(configuration=QuicConfiguration(is_client=True, alpn_protocols=["h3"], server_name=name))
    client.connect(("192.0.2.1", 443), now=0.0)
    return client


def quic_flight(name: str) -> bytes:
    """The first datagram of a client of aioquic that asks for a name."""
    return _client(name).datagrams_to_send(now=0.0)[0][0]


class QuicOpening:
    """A client's first packets, sealed one by one."""

    def __init__(self, name: str) -> None:
        client = _client(name)
        # There is no public way to the bytes before they are sealed.
        self.hello = bytes(client._crypto_streams[Epoch.INITIAL].sender._buffer)  # noqa: SLF001  # aioquic shows it nowhere else
        self.id, self.own = client._peer_cid.cid, client.host_cid  # noqa: SLF001  # aioquic shows it nowhere else
        self._number = -1

    def head(self, size: int) -> bytes:
        """The header of an Initial packet. size: of what follows, the packet number included."""
        ids = bytes((len(self.id),)) + self.id + bytes((len(self.own),)) + self.own
        return b"\xc1" + _VERSION.to_bytes(4, "big") + ids + b"\0" + (0x4000 | size).to_bytes(2, "big")

    def packet(self, frames: bytes, least: int) -> bytes:
        """An Initial packet. least: its size, by padding."""
        self._number += 1
        frames += bytes(max(0, least - len(frames) - len(self.head(0)) - 18))
        keys = CryptoPair()
        keys.setup_initial(self.id, is_client=True, version=_VERSION)
        header = self.head(2 + len(frames) + 16) + self._number.to_bytes(2, "big")
        sealed: bytes = keys.encrypt_packet(header, frames, self._number)
        return sealed

    def crypto(self, kind: bytes = _CRYPTO) -> bytes:
        """The hello as one CRYPTO frame. kind: the frame's type."""
        return kind + b"\0" + (0x4000 | len(self.hello)).to_bytes(2, "big") + self.hello

    def whole(self, least: int) -> bytes:
        """One packet with the whole hello. least: its size."""
        return self.packet(self.crypto(), least)
