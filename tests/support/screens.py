"""A terminal of a chosen size (tmux) in which a test runs a command, presses keys, and reads what is shown; `top` on one."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from agent import COMMAND, Agent
from namespace import Namespace


class Terminal:
    """One tmux session with one window."""

    def __init__(self, netns: Namespace, socket: Path) -> None:
        self._netns = netns
        self._tmux = ("tmux", "-S", str(socket), "-f", os.devnull)

    def start(self, command: str, width: int, height: int) -> None:
        """Run a shell command in it."""
        size = ("-x", str(width), "-y", str(height))
        self._netns.run(*self._tmux, "new-session", "-d", *size, "-s", "test", command, env=_environment())
        self._netns.run(*self._tmux, "set-option", "-g", "remain-on-exit", "on")

    def press(self, *keys: str) -> None:
        """Send keys, by the names that tmux has for them."""
        self._netns.run(*self._tmux, "send-keys", "-t", "test", *keys)

    def type(self, text: str) -> None:
        """Send characters."""
        self._netns.run(*self._tmux, "send-keys", "-t", "test", "-l", text)

    def resize(self, width: int, height: int) -> None:
        """Change its size; what runs in it is told."""
        self._netns.run(*self._tmux, "resize-window", "-t", "test", "-x", str(width), "-y", str(height))

    @property
    def text(self) -> str:
        """What is shown now, without spaces at the ends of lines."""
        shown = self._netns.run(*self._tmux, "capture-pane", "-p", "-t", "test").stdout
        return "\n".join(line.rstrip() for line in shown.splitlines())

    @property
    def everything(self) -> str:
        """What was shown so far, from the first line on, without the breaks of the terminal's own."""
        shown = self._netns.run(*self._tmux, "capture-pane", "-p", "-J", "-S", "-", "-t", "test").stdout
        return "\n".join(line.rstrip() for line in shown.splitlines())

    def end(self) -> None:
        """End what runs in it."""
        self._netns.run(*self._tmux, "kill-server", check=False)


@contextmanager
def terminal(netns: Namespace, socket: Path, argv: list[str], width: int, height: int) -> Iterator[Terminal]:
    """A terminal that runs a command, and then shows its exit code."""
    made = Terminal(netns, socket)
    try:
        made.start(f"{shlex.join(argv)}; echo exit $?; sleep 60", width, height)
        yield made
    finally:
        made.end()


def watched(*ports: int) -> str:
    """The configuration of an agent that watches UDP to these ports, and would drop what goes to 7001."""
    return f"""
[queue.main]
num = 7
mode = "monitor"
elements = ["dpi", "egress"]
[rules.udp]
queue = "main"
udp_ports = {list(ports)}
hooks = ["output"]
[element.egress]
type = "policy"
rule = [ {{ action = "drop", name = "no-7001", when = "dport = 7001" }} ]
"""


def top(agent: Agent, *words: str) -> list[str]:
    """The command line of `top` beside this agent."""
    return [*COMMAND, "top", *words, "--config", str(agent.config)]


def _environment() -> Mapping[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("TMUX", "COLUMNS", "LINES", "NO_COLOR")}
    return {**kept, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
