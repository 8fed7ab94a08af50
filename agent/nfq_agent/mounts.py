"""The mounts that a process sees: what proc_pid_mountinfo(5) says about each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

# The mounts of the process that reads it.
TABLE: Final = "/proc/self/mountinfo"
# Space, tab, newline and backslash are written so (mangle in fs/seq_file.c).
_ESCAPED: Final = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """point: the folder or file it is mounted on. kind: of the file system, as "cgroup2". read_only: the mount itself is."""

    point: str
    kind: str
    read_only: bool


def mounts(table: bytes) -> Iterator[Mount]:
    """The mounts of a table, in its order: of several at one place, the last one is in force.

    A name that is not UTF-8 is decoded as Python decodes file names.
    """
    for line in table.decode(errors="surrogateescape").split("\n"):
        before, _, after = line.partition(" - ")
        words = before.split(" ")
        if len(words) > 5:
            yield Mount(_ESCAPED.sub(_character, words[4]), after.partition(" ")[0], "ro" in words[5].split(","))


def _character(match: re.Match[str]) -> str:
    return chr(int(match[1], 8))
