"""The keys that are pressed on a terminal, one by one; without a terminal there are none."""

from __future__ import annotations

import codecs
import os
import re
import select
import sys
import termios
import time
from types import TracebackType
from typing import Any, Final

_NAMED: Final = {
    "\r": "enter", "\n": "enter", "\x7f": "backspace", "\b": "backspace", "\x1b": "escape",
    "\x1b[A": "up", "\x1b[B": "down", "\x1bOA": "up", "\x1bOB": "down", "\x1b[5~": "page-up", "\x1b[6~": "page-down",
    "\x1b[H": "home", "\x1bOH": "home", "\x1b[1~": "home", "\x15": "erase", "\x17": "erase-word", "\x1a": "suspend",
}  # fmt: skip
# A sequence of a key (ECMA-48, 5.4; SS3 of a terminal in application mode), or one character.
_KEY: Final = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1bO.|.", re.DOTALL)


def split(text: str) -> list[str]:
    """The keys in what a terminal sent: characters, and names as "up" and "enter". Unknown sequences are left out."""
    keys = (_NAMED.get(key, key) for key in _KEY.findall(text))
    return [key for key in keys if key.isprintable()]


class Keys:
    """Reads keys from standard input without echo while it is entered. Ctrl-C still interrupts."""

    def __init__(self, wanted: bool) -> None:
        """wanted: whether keys are read at all; they are not where standard input is not a terminal."""
        self._terminal = sys.stdin.fileno() if wanted and sys.stdin.isatty() else None
        self._before: list[Any] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __enter__(self) -> Keys:
        if self._terminal is not None:
            self._before = termios.tcgetattr(self._terminal)
            changed = termios.tcgetattr(self._terminal)
            changed[3] &= ~(termios.ECHO | termios.ICANON)
            # Ctrl-Z is a key: at once it would leave the shell with this screen.
            changed[6][termios.VSUSP] = b"\0"
            termios.tcsetattr(self._terminal, termios.TCSADRAIN, changed)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.restore()

    def restore(self) -> None:
        """Give the terminal its settings back."""
        if self._terminal is not None:
            termios.tcsetattr(self._terminal, termios.TCSADRAIN, self._before)

    def wait(self, seconds: float) -> list[str]:
        """The keys that are pressed within this time; the first ends the wait."""
        if self._terminal is None:
            time.sleep(seconds)
            return []
        if not select.select([self._terminal], [], [], seconds)[0]:
            return []
        data = os.read(self._terminal, 1024)
        if not data:
            # The terminal is gone.
            return ["q"]
        return split(self._decoder.decode(data))
