"""The reference of the queue is made from the docstrings, and the queue brings no package but its own."""

from __future__ import annotations

import subprocess
import sys

from namespace import ROOT


def test_the_reference_is_made_from_the_docstrings() -> None:
    made = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "make-queue-api")], capture_output=True, text=True, check=True
    ).stdout
    assert made == (ROOT / "docs" / "queue-api.md").read_text(), "run docs/make-queue-api > docs/queue-api.md"
    # Each public name of the queue has its words.
    assert "**`run(" in made
    assert "**`configure(" in made


def test_a_queue_alone_brings_no_foreign_package_but_its_own() -> None:
    script = (
        "import sys; from nfq_agent import Queue, Verdict\n"
        "print(sorted({'pydantic', 'typer', 'rich', 'iptc', 'sdnotify', 'netfilterqueue'} & set(sys.modules)))\n"
        "import nfq_agent; print(all(hasattr(nfq_agent, name) for name in nfq_agent.__all__), hasattr(nfq_agent, 'Quue'))"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said == "['netfilterqueue']\nTrue False\n"
