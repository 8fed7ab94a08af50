"""Which source files are made from others."""

from __future__ import annotations

from pathlib import Path


def made_by_cython(path: Path) -> bool:
    """Whether Cython makes this file: the C beside a .pyx, and that of the memory views of all of them."""
    return path.suffix == ".c" and (path.with_suffix(".pyx").exists() or path.name == "memory_views.c")
