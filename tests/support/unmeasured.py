"""The environment of programs whose coverage is not measured: what measuring loads and takes is not theirs."""

from __future__ import annotations

import os


def unmeasured() -> dict[str, str]:
    """That of this process, without what makes coverage measure each Python program that is started in it."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
