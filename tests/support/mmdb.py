"""Writes small databases in MaxMind's format (maxmind.github.io/MaxMind-DB), as geo conditions of a policy read them."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path

_MARKER = b"\xab\xcd\xefMaxMind.com"


def _control(kind: int, size: int) -> bytes:
    """The head of a value: type and size; types above 7 take a second byte."""
    assert size < 285
    head, more = (size, b"") if size < 29 else (29, bytes((size - 29,)))
    return (bytes((kind << 5 | head,)) if kind <= 7 else bytes((head, kind - 7))) + more


def _value(value: object) -> bytes:
    if isinstance(value, Mapping):
        return _control(7, len(value)) + b"".join(_value(key) + _value(each) for key, each in value.items())
    if isinstance(value, str):
        return _control(2, len(value.encode())) + value.encode()
    if isinstance(value, list):
        return _control(11, len(value)) + b"".join(map(_value, value))
    assert isinstance(value, int)
    return _control(6, 4) + struct.pack("!I", value)


def write_database(path: Path, records: Mapping[str, Mapping[str, object]], version: int = 6) -> Path:
    """Write a database with a record for each network. version: 4 for one that has IPv4 alone."""
    nodes: list[list[int | None]] = [[None, None]]
    data = b""
    leaves: list[tuple[int, int, int]] = []
    for text, record in records.items():
        network = ip_network(text)
        bits = f"{int(network.network_address):0{network.max_prefixlen}b}"[: network.prefixlen]
        if version == 6 and network.version == 4:
            bits = "0" * 96 + bits
        node = 0
        for bit in bits[:-1]:
            following = nodes[node][int(bit)]
            if following is None:
                following = nodes[node][int(bit)] = len(nodes)
                nodes.append([None, None])
            node = following
        leaves.append((node, int(bits[-1]), len(data)))
        data += _value(record)
    count = len(nodes)
    for node, side, offset in leaves:
        nodes[node][side] = count + 16 + offset
    tree = b"".join((count if side is None else side).to_bytes(3, "big") for pair in nodes for side in pair)
    about = {
        "node_count": count, "record_size": 24, "ip_version": version, "database_type": "Test", "languages": ["en"],
        "binary_format_major_version": 2, "binary_format_minor_version": 0, "build_epoch": 1, "description": {"en": "test"},
    }  # fmt: skip
    path.write_bytes(tree + bytes(16) + data + _MARKER + _value(about))
    path.chmod(0o644)
    return path
