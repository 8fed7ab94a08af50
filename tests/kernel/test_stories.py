"""The stories of the documentation that need no booted host, as a reader walks through them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from agent import until
from namespace import Namespace
from story import walk

_BIN = Path(sys.executable).parent


def shell(namespace: Namespace, folder: Path) -> list[str]:
    """A shell in the reader's folder, with the installed command."""
    environment = (f"PATH={_BIN}:{os.environ['PATH']}", "COLUMNS=80", "LOG_FORMAT=console")
    # Options of this run of pytest do not belong to the reader's run.
    return namespace.command(("env", f"--chdir={folder}", "--unset=PYTEST_ADDOPTS", *environment, "bash"))


@pytest.mark.parametrize("story", ["story-chaos", "story-connections", "story-element"])
def test_a_reader_s_walk(story: str, pair: tuple[Namespace, Namespace], tmp_path: Path) -> None:
    here, there = pair
    for parent in (tmp_path, *tmp_path.parents):
        if "pytest-" in str(parent):
            parent.chmod(0o755)
    pages = tmp_path / "other"
    pages.mkdir()
    (pages / "index.html").write_text("hello\n")
    there.start(sys.executable, "-m", "http.server", "8080", "--directory", str(pages), stderr=-3)
    until(lambda: ":8080" in there.run("ss", "-Hltn").stdout, "the other host serves")

    def write(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    walk(story, write, shell(here, tmp_path), shell(there, tmp_path))
    assert "nfq-agent" not in here.run("iptables-legacy-save").stdout
