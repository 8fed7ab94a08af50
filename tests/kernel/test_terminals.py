"""`top` on terminals of many sizes and kinds (tmux): resized, ended by signals, and while its agent is started again."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from agent import COMMAND, Agent, until
from namespace import Namespace
from screens import Terminal, terminal, top, watched

CONFIG = watched(53, 7000, 7001)
# A name that does not fit, one with control characters, and flows without a name.
SEND = r"""
import socket, time
def question(*labels):
    name = b"".join(bytes([len(label)]) + label for label in labels)
    return b"\x12\x34\x01\x00\x00\x01\0\0\0\0\0\0" + name + b"\0\0\1\0\1"
sends = [(53, question(*[b"z" * 63] * 3, b"long")), (53, question(b"a\x1b[31mred\x07", "\u65e5\u672c".encode(), b"test"))]
sends += [(7000, b"x" * 900), (7001, b"x" * 400)]
flows = [(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), port, data) for port, data in sends]
while True:
    for one, port, data in flows:
        try:
            one.sendto(data, ("127.0.0.1", port))
        except OSError:
            pass
    time.sleep(0.1)
"""
KEYS = {60: "f filter s sort g group d drops w would p pause q quit"}
ALL_KEYS = "f filter  s sort  g group  d drops  w would-drops  p pause  q quit"


@pytest.fixture
def agent(netns: Namespace, tmp_path: Path) -> Agent:
    """Beside four flows."""
    made = Agent(netns, tmp_path, CONFIG).ready()
    netns.start(sys.executable, "-c", SEND)
    # Its process may take long to start.
    until(lambda: made.totals()["received"] > 3, "all flows have begun")
    return made


def shows_flows(screen: Terminal) -> bool:
    return bool(re.search(r"would drop egress: ", screen.text)) and screen.text.count(" dns ") == 2


def test_a_screen_follows_the_size_of_its_terminal(agent: Agent, netns: Namespace, tmp_path: Path) -> None:
    with terminal(netns, tmp_path / "tmux", top(agent), 80, 24) as screen:
        until(lambda: shows_flows(screen), "all flows")
        for width, height in ((60, 24), (200, 60), (72, 12), (60, 10), (80, 24)):
            screen.resize(width, height)

            def drawn(width: int = width, height: int = height) -> bool:
                lines = screen.text.splitlines()
                whole = len(lines) == height and lines[0].startswith("Instance default: 4 flows, 0 dropped, 1 would drop")
                return whole and lines[-1] == KEYS.get(width, ALL_KEYS) and shows_flows(screen)

            until(drawn, f"the screen fills {width} columns and {height} lines")
            # One line for each flow, the head of the table, two lines above it, the keys below.
            assert sum(1 for line in screen.text.splitlines() if line) == 8
            assert "\\x1b[31mred" in screen.text or width < 200
        screen.press("q")
        until(lambda: "exit 0" in screen.text, "the end")
    assert agent.stop() == 0


def test_without_a_screen_the_flows_are_printed_at_the_end(agent: Agent, netns: Namespace, tmp_path: Path) -> None:
    argv = ["env", "TERM=dumb", *top(agent, "dport != 1", "--for", "2")]
    with terminal(netns, tmp_path / "tmux", argv, 80, 24) as screen:
        until(lambda: "exit 0" in screen.text, "the end")
        assert re.search(r"^Instance default: \d flows, ", screen.text, re.MULTILINE)
        assert "127.0.0.1:7001" in screen.text
    assert agent.stop() == 0


@pytest.mark.parametrize("locale", ["PYTHONIOENCODING=ascii", "PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 LC_ALL=C"])
@pytest.mark.parametrize("name", ["top", "trace", "status"])
def test_characters_that_the_locale_does_not_have_are_replaced(agent: Agent, netns: Namespace, name: str, locale: str) -> None:
    words = () if name == "status" else ("--for", "2")
    done = netns.run("env", *locale.split(), *COMMAND, name, "--config", str(agent.config), *words)
    assert "Traceback" not in done.stderr
    assert "egress" in done.stdout
    assert agent.stop() == 0


@pytest.mark.parametrize("by", ["C-c", "C-\\", "kill"])
def test_the_terminal_is_left_as_it_was(agent: Agent, netns: Namespace, tmp_path: Path, by: str) -> None:
    # What is shown before `top` is shown again, and typed characters are echoed.
    script = f"echo before; echo $$ >{tmp_path}/pid; exec env {' '.join(top(agent))}"
    argv = ["sh", "-c", f"trap : INT QUIT; stty -g | cksum; sh -c '{script}'; echo then $?; stty -g | cksum"]
    with terminal(netns, tmp_path / "tmux", argv, 80, 24) as screen:
        until(lambda: shows_flows(screen), "all flows")
        if by == "kill":
            netns.run("kill", (tmp_path / "pid").read_text().strip())
        else:
            screen.press(by)
        until(lambda: "exit 0" in screen.text, "the end")
        lines = [line for line in screen.text.splitlines() if line]
        assert lines[1:3] == ["before", "then 0"]
        assert lines[0] == lines[3], "the settings of the terminal"
    assert agent.stop() == 0


def test_a_shell_stops_and_continues_it(agent: Agent, netns: Namespace, tmp_path: Path) -> None:
    screen = Terminal(netns, tmp_path / "tmux")
    try:
        screen.start("env PS1='> ' bash --noprofile --norc -i", 80, 24)
        until(lambda: screen.text.strip() == ">", "the prompt")
        screen.type("stty -g | cksum; " + " ".join(top(agent)))
        screen.press("Enter")
        until(lambda: shows_flows(screen), "all flows")
        screen.press("C-z")
        until(lambda: "Stopped" in screen.text and screen.text.strip().endswith("\n>"), "the shell")
        screen.type("stty -g | cksum; fg")
        # The settings of the terminal are those of before.
        before = re.findall(r"^\d+ \d+$", screen.text, re.MULTILINE)
        screen.press("Enter")
        until(lambda: shows_flows(screen), "all flows again")
        screen.press("q")
        until(lambda: screen.text.strip().endswith("\n>"), "the shell again")
        assert re.findall(r"^\d+ \d+$", screen.text, re.MULTILINE) == before * 2
    finally:
        screen.end()
    assert agent.stop() == 0


def test_an_agent_that_is_started_again_is_asked_again(agent: Agent, netns: Namespace, tmp_path: Path) -> None:
    with (
        terminal(netns, tmp_path / "tmux", top(agent), 80, 24) as screen,
        terminal(netns, tmp_path / "trace", [*COMMAND, "trace", "dport = 53", "--config", str(agent.config)], 80, 24) as trace,
    ):
        until(lambda: shows_flows(screen) and "default: accept" in trace.text, "all flows, and a packet")
        assert agent.stop() == 0
        until(lambda: "no agent of instance default is running; it is asked again" in screen.text, "the agent is away")
        until(lambda: "it is asked again" in trace.everything.replace("\n", " "), "trace says so")
        agent.start()
        agent.ready()
        until(lambda: "asked again" not in screen.text and shows_flows(screen), "flows of the next agent")
        said = len(trace.everything)
        until(lambda: len(trace.everything) > said, "packets of the next agent")
        assert agent.stop() == 0
        until(lambda: "exit 1" in screen.text, "the end, since no agent answers")
        assert "no agent of instance default is running" in screen.text
        until(lambda: "exit 1" in trace.text, "the end of trace")
