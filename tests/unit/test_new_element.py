"""`new-element`: what it prints can be typed, and where it cannot write it leaves nothing behind."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nfq_agent.cli import catalogue


@pytest.mark.parametrize("folder", ["a b", "q'\"$x", "-dash", "n\u00e4me/deep"])
def test_the_lines_that_a_new_element_names_can_be_typed(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert catalogue.new_element("scan-guard", Path(folder)) == 0
    go, check = capsys.readouterr().out.splitlines()[-2:]
    script = f"{go.removeprefix('next: ').partition(' && ')[0]} && ls test_scan_guard.py"
    assert subprocess.run(["sh", "-ec", script], capture_output=True, text=True, check=True).stdout == "test_scan_guard.py\n"
    assert Path(shlex.split(check)[-1]).samefile(tmp_path / folder / "scan_guard.toml")
    assert not shlex.split(check)[-1].startswith("-")


def test_of_a_new_element_that_cannot_be_written_nothing_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # No file may have more bytes: of the three the first one is too large, and the others are not.
    limited = ["prlimit", "--fsize=500", sys.executable, "-m", "nfq_agent", "new-element", "scan-guard", "--into", str(tmp_path)]
    done = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "nothing was written; --into takes a folder that can be written" in done.stderr
    assert list(tmp_path.rglob("*.*")) == []
    (link := tmp_path / "elements" / "test_scan_guard.py").symlink_to("missing/folder")
    assert catalogue.new_element("scan-guard", tmp_path) == 1
    assert f"{link} exists; nothing was written" in capsys.readouterr().err
    assert link.is_symlink()
    (tmp_path / "file").touch()
    assert catalogue.new_element("scan-guard", tmp_path / "file") == 1
