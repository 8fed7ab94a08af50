"""The reference is what the docstrings say now."""

from __future__ import annotations

import subprocess
import sys

from conftest import ROOT


def test_the_reference_is_made_from_the_docstrings() -> None:
    made = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "make-queue-api")], capture_output=True, text=True, check=True
    ).stdout
    assert made == (ROOT / "docs" / "queue-api.md").read_text(), "run docs/make-queue-api > docs/queue-api.md"
    # Each public name of the queue has its words.
    assert "**`run(" in made
    assert "**`configure(" in made
