"""The descriptors of this process."""

from __future__ import annotations

import gc
import os


def open_descriptors() -> set[str]:
    """Those that are open. What earlier tests left to the garbage collector is closed before: it would be closed at any time."""
    gc.collect()
    return set(os.listdir("/proc/self/fd"))
