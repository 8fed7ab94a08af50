"""Commands in a forked child: what a new interpreter would first load for a second is there already."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from nfq_agent.__main__ import main
from nfq_agent.host.fork import fork


def in_child(life: Callable[[], int], folder: Path | None = None) -> CompletedProcess[str]:
    """What a child that runs `life` in this folder returned and printed. SystemExit is its code, as it is in a program."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err, warnings.catch_warnings():
        # Of pytest-xdist's threads, which hold nothing that the child uses.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        pid = fork(lambda: _with_output(life, out.fileno(), err.fileno(), folder))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0)
        err.seek(0)
        return CompletedProcess([], code, out.read(), err.read())


def _with_output(life: Callable[[], int], out: int, err: int, folder: Path | None) -> int:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    if folder is not None:
        os.chdir(folder)
    with (
        contextlib.redirect_stdout(io.TextIOWrapper(open(1, "wb", 0, closefd=False), write_through=True)),
        contextlib.redirect_stderr(io.TextIOWrapper(open(2, "wb", 0, closefd=False), write_through=True)),
    ):
        try:
            return life()
        except SystemExit as end:
            return int(end.code or 0)


def verb(*words: str) -> CompletedProcess[str]:
    """`nfq-agent` with these words."""

    def life() -> int:
        sys.argv = ["nfq-agent", *words]
        main()
        return 0

    return in_child(life)


def pytest_in(folder: Path, *arguments: str) -> CompletedProcess[str]:
    """`python -m pytest` with these arguments in a folder, which has its own tests and elements."""

    def life() -> int:
        sys.path.insert(0, str(folder))
        return int(pytest.main(["-q", "-p", "no:cacheprovider", *arguments]))

    return in_child(life, folder)
