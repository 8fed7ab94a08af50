"""The flags of the baseline agent. Imports nothing: what the units run needs no parser."""

from __future__ import annotations

from collections.abc import Sequence
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
    """Settings of the command line that override the configuration file."""

    config: Path | None = None
    instance: str | None = None
    queue_num: int | None = None
    copymode: CopyMode | None = None
    log_5tuple: bool = False
    af_family: AddressFamily | None = None


def plain(arguments: Sequence[str]) -> Flags | None:
    """The flags where the arguments are `--config FILE` and `--instance NAME` at most, each once; None for all others."""
    found: dict[str, str] = {}
    words = iter(arguments)
    for word in words:
        name = {"--config": "config", "-c": "config", "--instance": "instance"}.get(word)
        value = next(words, "")
        if name is None or name in found or not value or value.startswith("-"):
            return None
        found[name] = value
    return Flags(Path(found["config"]) if "config" in found else None, found.get("instance"))
