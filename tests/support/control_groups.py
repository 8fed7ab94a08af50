"""Control groups that a test makes."""

from __future__ import annotations

from pathlib import Path

from agent import until


def leave(group: Path) -> None:
    """Remove the group, once its processes have ended."""
    until(lambda: not (group / "cgroup.procs").read_text(), "the group is empty")
    group.rmdir()
