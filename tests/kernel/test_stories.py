"""The stories of the documentation that need no booted host, as a reader walks through them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from agent import until
from namespace import Namespace
from story import File, Shell, steps

_BIN = Path(sys.executable).parent


@contextmanager
def shell(namespace: Namespace, folder: Path) -> Iterator[Shell]:
    """In the reader's folder, with the installed command."""
    environment = (f"PATH={_BIN}:{os.environ['PATH']}", "COLUMNS=80", "LOG_FORMAT=console")
    # Options of this run of pytest are none of the reader's.
    made = Shell(namespace.command(("env", f"--chdir={folder}", "--unset=PYTEST_ADDOPTS", *environment, "bash")))
    try:
        yield made
    finally:
        made.close()


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
    with shell(here, tmp_path) as ours, shell(there, tmp_path) as others:
        for step in steps(story):
            if isinstance(step, File):
                path = tmp_path / step.path
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(step.text)
            else:
                step.check(others.run if step.other else ours.run)
    assert "nfq-agent" not in here.run("iptables-legacy-save").stdout
