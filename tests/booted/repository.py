"""The repository that packaging/release makes, and its way to a host."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from booted.container import Container


def release_of(source: Path, key: str, out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(source / "packaging/release"), "--key", key, "--out", str(out), "--url", "http://127.0.0.1:8000", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)


@contextlib.contextmanager
def served(host: Container, out: Path) -> Iterator[None]:
    """A host finds the repository under http://127.0.0.1:8000."""
    serve = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(out), "8000"]
    with subprocess.Popen(["nsenter", f"--target={host.pid}", "--net", *serve], stderr=subprocess.DEVNULL) as server:
        try:
            yield
        finally:
            server.terminate()
