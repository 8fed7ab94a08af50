"""Control groups that a test makes."""

from __future__ import annotations

import errno
from pathlib import Path

from agent import until


def joined(group: Path, *argv: str) -> list[str]:
    """The argv of a shell that joins the group, and becomes the program `argv`."""
    return ["sh", "-ec", 'echo $$ >"$1/cgroup.procs"; shift; exec "$@"', "sh", str(group), *argv]


def leave(group: Path) -> None:
    """Remove the group, once its processes have ended."""

    def removed() -> bool:
        try:
            group.rmdir()
        except OSError as error:
            # One that ends is not listed any more, and is still there.
            if error.errno != errno.EBUSY:
                raise
            return False
        return True

    until(removed, "the group is empty")
