"""The findings of `doctor` about /run: whether the agent can write there, and the xtables lock."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from nfq_agent.cli.finding import Finding
from nfq_agent.host.xtables.lock import held_by, holders, lock_path, open_lock
from nfq_agent.rules.model import RuleError
from nfq_agent.service import control


def run_findings(admin: bool) -> Iterator[Finding]:
    """admin: whether this process has CAP_NET_ADMIN."""
    yield from _folder(admin)
    yield from _lock(admin)


def _folder(admin: bool) -> Iterator[Finding]:
    folder = control.folder()
    if (fault := _fault(folder)) is None:
        yield Finding("good", "run folder", f"{folder} can be written")
    elif admin:
        yield Finding("error", "run folder", f"{folder}: {fault[0]}: no agent can start", fault[1])
    else:
        yield Finding("warning", "run folder", f"{folder}: {fault[0]}", "run this as root (sudo)")


def _fault(path: Path) -> tuple[str, str] | None:
    """Why this process cannot create a file in the folder, or the folder itself, and what to do; None if it can."""
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir() or (there != path and path.is_symlink()):
        return "it is not a folder", f"remove {there}"
    try:
        system = os.statvfs(there)
    except OSError as error:
        return f"cannot be looked at ({error.strerror})", "run as root"
    if system.f_flag & os.ST_RDONLY:
        return "its file system is read-only", f"mount {there} writable"
    # A file system without a limit of files reports no free ones, too.
    if system.f_bavail == 0 or (system.f_files and system.f_favail == 0):
        return "its file system is full", "free some space there"
    if not os.access(there, os.W_OK | os.X_OK):
        return "this process may not write there", "run as root, or start the systemd unit"
    return None


def _lock(admin: bool) -> Iterator[Finding]:
    path = Path(lock_path())
    if not path.exists():
        if (fault := _fault(path.parent)) is None:
            yield Finding("good", "xtables lock", f"{path} does not exist yet and will be created")
        elif admin:
            yield Finding(
                "error",
                "xtables lock",
                f"{path} does not exist and cannot be created: {fault[0]}",
                f'{fault[1]}, or set backend = "owned", which needs no lock',
            )
        else:
            yield Finding("warning", "xtables lock", f"{path} does not exist yet", "run this as root (sudo)")
        return
    try:
        lock = open_lock(create=False)
    except RuleError as error:
        what, _, remedy = str(error).removeprefix("the xtables lock ").partition("; ")
        yield (
            Finding("error", "xtables lock", what, remedy)
            if admin
            else Finding("warning", "xtables lock", what, "run this as root (sudo)")
        )
        return
    try:
        if holders(lock):
            yield Finding(
                "warning",
                "xtables lock",
                f"{held_by(lock)} right now",
                "it is normally held for milliseconds; if it stays, look at that process",
            )
        else:
            yield Finding("good", "xtables lock", "free")
    finally:
        os.close(lock)
