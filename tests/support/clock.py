"""The monotonic clock of the agent's workers, moved on by a test."""

from __future__ import annotations

import struct
from pathlib import Path

# The clock of processes that are forked, moved on by a number in a file. Not that of the supervisor: it would take a worker that
# has not beaten since for one that hangs, and kill it.
CLOCK = """
import mmap, os, struct, time
_file = open("{path}", "r+b")
_offset = mmap.mmap(_file.fileno(), 8)
_monotonic = time.monotonic
_forked = []
os.register_at_fork(after_in_child=lambda: _forked.append(True))
time.monotonic = lambda: _monotonic() + (struct.unpack("d", _offset[:8])[0] if _forked else 0.0)
"""


def moved_clock(folder: Path) -> tuple[dict[str, str], Path]:
    """What the agent's environment has so that its workers' clock can be moved, and the file with the seconds."""
    offset = folder / "offset"
    offset.write_bytes(struct.pack("d", 0.0))
    library = folder / "clock"
    library.mkdir()
    (library / "sitecustomize.py").write_text(CLOCK.format(path=offset))
    return {"PYTHONPATH": str(library)}, offset
