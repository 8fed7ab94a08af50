"""The stories of docs/story-*.md, and docs/getting-started.md, as steps: the files and the commands that stand on a page, with
the output that it shows.

A file is a block with `title="PATH"`. In a `console` block a line after `host# ` is a command of root on this host, after
`other# ` on another host; the lines below it are its whole output. `...` stands for any text within a line, and
alone on a line for any lines. The widths of a table's columns do not count. All commands of a host run in one shell, as in the
reader's terminal.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
STORIES = sorted(page.stem for page in DOCS.glob("story-*.md"))
# All pages that a test walks through.
WALKED = ["getting-started", *STORIES]
_BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)
_PROMPT = re.compile(r"(host# |other# )(.*)")
# Commands that only show, and are asked again until they show what is expected.
_SHOWS = re.compile(r"journalctl|grep|nfq-agent (status|rules)")
_PATIENCE = 90.0
# A reader's pause. What the reader waits for takes longer on a loaded machine.
_PAUSE = re.compile(r"sleep (\d+)")
_LONGER = 3
# After the output of a command.
_END = "--- the command has ended ---"


@dataclass(frozen=True, slots=True)
class File:
    """A file that the reader writes."""

    path: str
    text: str


@dataclass(frozen=True, slots=True)
class Command:
    """A command that the reader types. output: what the page shows below it."""

    other: bool
    text: str
    output: str

    def shows(self, printed: str) -> bool:
        """Whether this is what the page shows."""
        parts = [r"(?:.*\n)*" if line == "..." else _line(line) for line in _plain(self.output).splitlines()]
        return re.fullmatch("".join(parts), _plain(printed)) is not None

    def check(self, run: Callable[[str], str]) -> None:
        """Run it; fail unless it prints what the page shows. A command that only shows is asked until it does."""
        deadline = time.monotonic() + (_PATIENCE if _SHOWS.match(self.text) else 0)
        pause = _PAUSE.fullmatch(self.text)
        text = f"sleep {_LONGER * int(pause[1])}" if pause else self.text
        while not self.shows(printed := run(text)):
            assert time.monotonic() < deadline, f"{self.text}\nthe page shows:\n{self.output}\nprinted:\n{printed}"
            time.sleep(0.1)


class Shell:
    """A terminal of the reader: one shell, without what a terminal adds. argv: what starts it."""

    def __init__(self, argv: Sequence[str]) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen([*argv], stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True)

    def run(self, text: str) -> str:
        """What a command prints, with what it prints as errors."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{{ {text}\n}} </dev/null\necho {_END}\n")
        self._process.stdin.flush()
        printed = ""
        while not printed.endswith(f"{_END}\n"):
            line = self._process.stdout.readline()
            assert line, f"the shell ended: {printed}"
            printed += line
        return printed.removesuffix(f"{_END}\n")

    def close(self) -> None:
        """The end of its input ends it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(_PATIENCE)
        assert self._process.stdout is not None
        self._process.stdout.close()


def walk(story: str, write: Callable[[str, str], object], ours: Sequence[str], others: Sequence[str]) -> None:
    """Do what a page says. write: puts a text into a file. ours, others: what starts the shells of the two hosts."""
    with closing(Shell(ours)) as here, closing(Shell(others)) as there:
        for step in steps(story):
            if isinstance(step, File):
                write(step.path, step.text)
            else:
                step.check(there.run if step.other else here.run)


def _plain(text: str) -> str:
    """With one space for many, and none at the end of a line."""
    return re.sub(r" +\n", "\n", re.sub(r"─+", "─", re.sub(r" +", " ", text)))


def _line(shown: str) -> str:
    return ".*".join(map(re.escape, shown.split("..."))) + r"\n"


def steps(story: str) -> Iterator[File | Command]:
    """The steps of a page, in order."""
    for language, path, text in _BLOCK.findall((DOCS / f"{story}.md").read_text()):
        if path:
            yield File(path, text)
        elif language == "console":
            yield from _commands(text.splitlines())


def _commands(lines: list[str]) -> Iterator[Command]:
    prompts = [number for number, line in enumerate(lines) if _PROMPT.fullmatch(line)]
    assert prompts[:1] == [0], "a console block begins with a command"
    for number, end in zip(prompts, [*prompts[1:], len(lines)], strict=True):
        prompt = _PROMPT.fullmatch(lines[number])
        assert prompt is not None
        yield Command(prompt[1] == "other# ", prompt[2], "".join(f"{line}\n" for line in lines[number + 1 : end]))
