"""The tutorial of docs/elements.md as files."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent.parent / "docs" / "elements.md"


def block(name: str) -> str:
    """The block of the tutorial that begins with a comment naming this file."""
    (found,) = re.findall(rf"```\w+\n# {re.escape(name)}\n(.*?)```", DOCS.read_text(), re.DOTALL)
    return str(found)


def write_tutorial(folder: Path) -> None:
    """Write the files of the tutorial into a folder, as a reader who follows it has them."""
    (folder / "nfq-agent.toml").write_text(block("nfq-agent.toml"))
    elements = folder / "elements"
    elements.mkdir()
    for name in ("scan_guard.py", "test_scan_guard.py"):
        (elements / name).write_text(block(name))
