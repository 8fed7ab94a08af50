"""The version of the installed package."""

from __future__ import annotations

from functools import cache
from importlib import metadata


@cache
def version() -> str:
    """The version of the installed package; "unknown" if it is not installed."""
    try:
        return metadata.version("nfq-agent")
    except metadata.PackageNotFoundError:
        return "unknown"


__version__ = version()
