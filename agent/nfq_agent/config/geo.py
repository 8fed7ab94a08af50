"""Location databases that a user provides, in MaxMind's format (.mmdb): read whole at load, since a worker opens no file."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Final
from zlib import crc32

from nfq_agent.geography import NOWHERE, Whereabouts, place
from nfq_agent.packet import address as text_of

Stamp = tuple[int, int, int]
# Addresses whose place is remembered: a look-up walks up to 128 levels of a tree.
_REMEMBERED: Final = 65536


class GeoFiles:
    """The `Geography` of some databases. Equal where the files are the same versions, so that a reload notices a change."""

    def __init__(self, readers: Iterable[tuple[Path, Stamp, Any]]) -> None:
        readers = tuple(readers)
        self._versions = tuple((str(path), stamp) for path, stamp, _ in readers)
        self._readers = tuple((reader, reader.metadata().ip_version == 4) for _, _, reader in readers)
        self._remembered = lru_cache(_REMEMBERED)(self._look_up)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GeoFiles) and self._versions == other._versions

    def __hash__(self) -> int:
        return hash(self._versions)

    def __repr__(self) -> str:
        return f"GeoFiles({self._versions})"

    def __str__(self) -> str:
        return ", ".join(f"{path} ({crc32(repr(version).encode()):08x})" for path, version in self._versions)

    def whereabouts(self, address: bytes) -> Whereabouts:
        """The place of a packed address: country and system each from the first database that has it."""
        return self._remembered(address)

    def _look_up(self, address: bytes) -> Whereabouts:
        found = NOWHERE
        for reader, only_v4 in self._readers:
            if not (only_v4 and len(address) == 16):
                here = place(reader.get(text_of(address)))
                found = Whereabouts(found.country or here.country, found.asn or here.asn)
        return found


def database(path: Path, file: BinaryIO) -> Any:
    """A reader of an open database, whole in memory. Raises ValueError."""
    try:
        import maxminddb  # noqa: PLC0415  # an extra: only this needs it
    except ImportError:
        raise ValueError(
            f"{path}: read by the Python package maxminddb, which is not installed; "
            "allowed: with it (package python3-maxminddb, or the extra nfq-agent[geo])"
        ) from None
    try:
        reader = maxminddb.open_database(file, maxminddb.MODE_FD)
        # A file that was cut has its description, and records that end nowhere.
        reader.get("192.0.2.1")
        next(iter(reader), None)
    except (maxminddb.InvalidDatabaseError, ValueError, TypeError, EOFError, IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a usable database: {error}; allowed: a file in MaxMind's format (.mmdb)") from None
    return reader
