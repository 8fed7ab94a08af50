"""All legacy rules as `iptables-legacy-save` prints them, also those of others. It changes nothing and makes no table present."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from nfq_agent.rules.model import Family

TOOLS: Final[Mapping[Family, str]] = {"inet": "iptables-legacy", "inet6": "ip6tables-legacy"}


def saved(family: Family, seconds: float = 30.0) -> str:
    """All tables that are present; empty if there is no such command, or it does not end within `seconds`."""
    try:
        import subprocess
    except ImportError:
        # Loaded only here; it takes descriptors, of which none may be left.
        return ""
    try:
        done = subprocess.run(
            [f"{TOOLS[family]}-save"], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=seconds, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout
