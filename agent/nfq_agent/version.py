"""The version of the installed package."""

from __future__ import annotations

from importlib import metadata


def version() -> str:
    """As the package says it; "unknown" where it runs from a folder that was never installed."""
    try:
        return metadata.version("nfq-agent")
    except metadata.PackageNotFoundError:
        return "unknown"
