"""BitTorrent: the handshake of peers (BEP 3) and the messages of the DHT (BEP 5). Steps: a fixed number."""

from __future__ import annotations

from typing import Any, Final

from nfq_agent.protocols import MORE, NO, Found, Protocol, Result

_HANDSHAKE: Final = b"\x13BitTorrent protocol"
_WHOLE: Final = len(_HANDSHAKE) + 8 + 20
_QUERIES: Final = (b"d1:ad2:id20:", b"d1:rd2:id20:")


def parse(client: bytes, server: bytes) -> Result:
    """bittorrent_info_hash is the torrent's, in hexadecimal digits."""
    if not client.startswith(_HANDSHAKE[: len(client)]):
        return NO
    if len(client) < _WHOLE:
        return MORE
    facts: dict[str, Any] = {"protocol": "bittorrent", "bittorrent_info_hash": client[_WHOLE - 20 : _WHOLE].hex()}
    return Found(facts)


def datagram(data: bytes) -> Result:
    """A query or a response of the DHT."""
    return Found({"protocol": "bittorrent"}) if data.startswith(_QUERIES) and data.endswith(b"e") else NO


PROTOCOL: Final = Protocol(
    "bittorrent", facts=("bittorrent_info_hash",), headline="bittorrent_info_hash", parse=parse, datagram=datagram
)
