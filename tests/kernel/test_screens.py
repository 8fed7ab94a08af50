"""Every verb on a terminal (tmux) of 80 and of 60 columns beside a running agent with real traffic: no line is broken by the
terminal, and what is shown is the golden text."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL

import pytest
from agent import COMMAND, Agent, until
from namespace import Namespace
from screens import terminal, top

CONFIG = """
[queue.egress]
num = 7
mode = "monitor"
elements = ["dpi", "names", "capture"]
[rules.egress]
queue = "egress"
hooks = ["output"]
tcp_ports = [8080]
udp_ports = [53]
role = "client"
[element.names]
type = "policy"
default = "accept"
rule = [
  { action = "accept", name = "packages", http_host = ["deb.debian.test", "security.debian.test"] },
  { action = "drop", name = "telemetry", http_host = "*.telemetry.vendor.test", dport = 8080 },
]
[element.capture]
type = "pcap"
directory = "FOLDER"
"""
NEW = CONFIG.replace('"monitor"', '"enforce"').replace("[8080]", "[8080, 8443]")
GOLDEN = Path(__file__).parent / "screens"
RULE = re.compile(r"-[AIDNX] (NFQA|OUTPUT|INPUT)")


def masked(text: str) -> str:
    """Without figures, which differ from run to run, and what they move."""
    found = []
    for line in text.splitlines():
        plain = re.sub(r"up [^,]*,", "up #,", line)
        plain = plain if plain.startswith("exit ") else re.sub(r"[\d.:]*\d", "#", plain)
        found.append(re.sub(r"( |─)+", r"\1", plain).rstrip())
    return "\n".join(found).strip("\n")


def serve(netns: Namespace, folder: Path) -> Agent:
    """The agent, that has seen three flows; one would have been dropped."""
    captures = folder / "captures"
    captures.mkdir()
    captures.chmod(0o777)
    (folder / "new.toml").write_text(NEW.replace("FOLDER", str(captures)))
    agent = Agent(netns, folder, CONFIG.replace("FOLDER", str(captures))).ready()
    netns.start(sys.executable, "-m", "http.server", "8080", "--bind", "127.0.0.1", stdout=DEVNULL, stderr=DEVNULL)
    until(lambda: ":8080" in netns.run("ss", "-Hltn").stdout, "the server listens")
    for name in ("deb.debian.test", "eu.telemetry.vendor.test", "www.example.test"):
        ask(netns, name)
    return agent


def ask(netns: Namespace, name: str) -> None:
    netns.run("curl", "-s", "-m", "20", "-o", "/dev/null", "-H", f"Host: {name}", "http://127.0.0.1:8080/")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path, always of the same length: what is wrapped where depends on it."""
    path = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


class Screens:
    """Terminals of one width, one for each verb."""

    def __init__(self, netns: Namespace, folder: Path, width: int) -> None:
        self._netns, self._folder, self._width = netns, folder, width

    def shown(self, name: str, *words: str) -> str:
        """What a verb leaves on a terminal, with its exit code; fails where the terminal broke a line."""
        # A server that ends takes no new session: each has a socket of its own.
        with terminal(self._netns, self._folder / f"tmux-{name}", [*COMMAND, *words], self._width, 50) as screen:
            until(lambda: re.search(r"^exit \d+$", screen.text, re.MULTILINE), f"{words} ends")
            text = screen.everything
        fits(text, self._width)
        return text

    def check(self, name: str, *words: str) -> None:
        """What a verb shows is the golden text; NFQ_GOLDEN=write in the environment writes it."""
        text = masked(self.shown(name, *words).replace(str(self._folder), "FOLDER"))
        golden = GOLDEN / f"{name}-{self._width}.txt"
        if os.environ.get("NFQ_GOLDEN") == "write":
            golden.write_text(text + "\n")
        assert text + "\n" == golden.read_text()


def fits(text: str, width: int) -> None:
    """No line is broken by the terminal, but for rules in full, which are commands to be copied."""
    assert [line for line in text.splitlines() if len(line) > width and not RULE.search(line)] == []


@pytest.mark.parametrize("width", [80, 60])
def test_each_verb_fits_the_terminal(netns: Namespace, folder: Path, width: int) -> None:
    agent = serve(netns, folder)
    config, new = str(agent.config), str(folder / "new.toml")
    screens = Screens(netns, folder, width)
    screens.check("status", "status")
    screens.check("check", "check", "--config", config)
    screens.check("plan", "plan", "--config", new)
    screens.shown("rules", "rules")
    screens.check("explain", "explain", "tcp", "192.0.2.7:8080", "--name", "eu.telemetry.vendor.test", "--config", config)
    screens.shown("elements", "elements")
    screens.shown("element", "elements", "policy")
    # Where these are wrapped depends on the length of a number.
    screens.shown("refused", "remove")
    screens.shown("confirm", "confirm")
    screens.check("chaos-off", "chaos", "off")
    screens.check("chaos", "chaos", "on", "egress", "delay=0.5", "--for", "600s")
    screens.check("reload", "reload")
    screens.shown("unknown", "elements", "slicr")
    screens.shown("bugreport", "bugreport", "-o", str(folder / "report.txt"), "--config", config)
    screens.shown("doctor", "doctor", "--config", config)
    assert agent.stop() == 0
    (capture,) = (folder / "captures").glob("*.pcapng")
    screens.check("replay", "replay", str(capture), "--config", new, "--against", config)
    screens.check("learn", "learn", str(capture), "--config", config, "-o", str(folder / "proposal.toml"))
    screens.check("status-down", "status")
    assert max(map(len, (folder / "proposal.toml").read_text().splitlines())) <= 80


@pytest.mark.parametrize("width", [80, 60])
def test_a_trace_and_groups_of_flows_fit_the_terminal(netns: Namespace, folder: Path, width: int) -> None:
    agent = serve(netns, folder)
    argv = [*COMMAND, "trace", "name ~ *.vendor.test", "--for", "600", "--config", str(agent.config)]
    with terminal(netns, folder / "trace", argv, width, 50) as screen:

        def traced() -> bool:
            ask(netns, "eu.telemetry.vendor.test")
            return "names: would drop by rule 2 (telemetry)" in screen.text

        until(traced, "a packet is traced")
        screen.press("C-c")
        until(lambda: "exit 0" in screen.text, "the end")
        fits(screen.everything, width)
        first = " OUTPUT, # bytes, http" + "\n eu.telemetry.vendor.test"
        assert f"{first}\n dpi: no answer\n names: would drop by rule # (telemetry)" in masked(screen.everything)
    with terminal(netns, folder / "top", top(agent), width, 24) as screen:

        def grouped() -> bool:
            ask(netns, "eu.telemetry.vendor.test")
            return bool(re.search(r"eu\.telemetry\.vendor\.test$", screen.text, re.MULTILINE))

        until(lambda: "sorted by rate" in screen.text, "the screen")
        screen.press("g", "g")
        until(grouped, "flows by name")
        assert screen.text.splitlines()[-1].endswith(" quit")
        fits(screen.everything, width)
        screen.press("q")
        until(lambda: "exit 0" in screen.text, "the end")
    assert agent.stop() == 0
