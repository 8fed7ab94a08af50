"""The repository that packaging/release makes, and its way to a host."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from booted.container import Container
from booted.nspawn import checked, until
from booted.packages import TOP, Packages


def release_of(source: Path, key: str, out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(source / "packaging/release"), "--key", key, "--out", str(out), "--url", "http://127.0.0.1:8000", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, stdin=subprocess.DEVNULL)


def repository(built: Packages, key: str, folder: Path) -> Path:
    """The repository of the working tree's version with one release's packages, made in `folder`."""
    version = re.findall(r'^version = "(.*)"$', (TOP / "pyproject.toml").read_text(), re.MULTILINE)[0]
    # The working tree's repository may get commits meanwhile.
    checked(["git", "clone", "--quiet", "--shared", str(TOP), str(folder / "clone")])
    done = release_of(folder / "clone", key, folder / "out", "--version", version, str(built.folder))
    assert done.returncode == 0, done.stderr
    return folder / "out"


@contextlib.contextmanager
def served(host: Container, out: Path) -> Iterator[None]:
    """A host finds the repository under http://127.0.0.1:8000."""
    serve = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(out), "8000"]
    with subprocess.Popen(
        ["nsenter", f"--target={host.pid}", "--net", *serve], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            until(lambda: ":8000" in host.run("ss", "--listening", "--tcp", "--numeric").stdout, "the repository is served")
            yield
        finally:
            server.terminate()
