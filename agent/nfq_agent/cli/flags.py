"""The flags of the baseline agent. Imports nothing: `run` without arguments needs no parser."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class CopyMode(StrEnum):
    """--copymode"""

    packet = "packet"
    meta = "meta"
    none = "none"


class AddressFamily(StrEnum):
    """--af-family"""

    unspec = "unspec"
    inet = "inet"
    inet6 = "inet6"


@dataclass(frozen=True, slots=True)
class Flags:
    """What the command line says in place of the configuration file."""

    config: Path | None = None
    instance: str | None = None
    queue_num: int | None = None
    copymode: CopyMode | None = None
    log_5tuple: bool = False
    af_family: AddressFamily | None = None
