"""`top` on a terminal (tmux) with real traffic: what is shown at 80 columns and at 200, and what the keys change."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from subprocess import DEVNULL, PIPE

from agent import Agent, until
from namespace import Namespace
from screens import Terminal, terminal, top, watched

CONFIG = watched(7000, 7001, 7002)
SEND = """
import socket, time
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
one.bind(("127.0.0.1", 6000))
for _ in range(6000):
    for port, size in ((7000, 900), (7001, 400), (7002, 10)):
        try:
            one.sendto(b"x" * size, ("127.0.0.1", port))
        except OSError:
            pass
    time.sleep(0.1)
"""
# Figures differ from run to run.
FIGURES = re.compile(r" *\d+\.\d kB|  +\d+ B(?!/)")
GOLDEN = """\
Instance default: 3 flows, 0 dropped, 1 would drop,#/s
all, by flow, sorted by rate
     B/s who       name             destination      verdict    rule
# -         udp              127.0.0.1:7000   accept     default
# -         udp              127.0.0.1:7001   would drop egress: rule 1…
# -         udp              127.0.0.1:7002   accept     default
"""
HELP = "f filter  s sort  g group  d drops  w would-drops  p pause  q quit"


# The compiled table accepts the connection by its name, without the elements.
NAMES = """
[queue.main]
num = 7
elements = ["dpi", "names"]
[element.names]
type = "policy"
rule = [{ action = "accept", name = "a", http_host = "a.test" }]
[rules.web]
queue = "main"
hooks = ["output"]
tcp_ports = [8080]
"""
# Says a name, reads the answer, and keeps the connection.
KEEP = """
import socket, time
server = socket.create_server(("127.0.0.1", 8080))
one = socket.create_connection(("127.0.0.1", 8080))
other, _ = server.accept()
one.sendall(b"GET / HTTP/1.1\\r\\nHost: a.test\\r\\n\\r\\n")
assert other.recv(4096)
other.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\n\\r\\n")
assert one.recv(4096)
print("said", flush=True)
time.sleep(600)
"""


def shown(screen: Terminal) -> str:
    return FIGURES.sub("#", screen.text)


def rows(screen: Terminal) -> list[str]:
    """Ports of the destinations."""
    return re.findall(r"127\.0\.0\.1:(700\d)", screen.text)


def test_the_screen_and_its_keys(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, CONFIG).ready()
    netns.start(sys.executable, "-c", SEND)
    with terminal(netns, tmp_path / "narrow", top(agent), 80, 24) as screen:
        until(lambda: rows(screen) == ["7000", "7001", "7002"] and " 0 B" not in screen.text, "all flows, by rate")
        until(lambda: shown(screen) == GOLDEN + "\n" * 17 + HELP, "the whole screen")
        screen.press("w")
        until(lambda: rows(screen) == ["7001"], "flows that would be dropped")
        screen.press("w", "f")
        screen.type("dport = 7000, 7002 and verdict != drop")
        screen.press("Enter")
        until(lambda: rows(screen) == ["7000", "7002"], "flows that the filter matches")
        screen.press("f")
        screen.type(" and nam = x")
        screen.press("Enter")
        until(lambda: "'nam' is not a field" in screen.text, "the fault of the filter")
        screen.press("Escape", "g", "g", "g")
        until(lambda: "dropped   would destination" in screen.text, "groups")
        screen.press("q")
        until(lambda: "exit 0" in screen.text, "the end")
    assert agent.stop() == 0


def test_a_wide_terminal_has_more_columns(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, CONFIG).ready()
    netns.start(sys.executable, "-c", SEND)
    with terminal(netns, tmp_path / "wide", top(agent), 200, 60) as screen:
        until(lambda: "127.0.0.1:6000" in screen.text and "rule 1 (no-7001)" in screen.text, "both ends, and the whole rule")
        assert screen.text.splitlines()[59] == HELP
        screen.press("C-c")
        until(lambda: "exit 0" in screen.text, "the end")
    assert agent.stop() == 0


def test_a_connection_that_was_accepted_by_its_name_before_is_shown(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, NAMES).ready()
    keeps = netns.start(sys.executable, "-c", KEEP, stdout=PIPE)
    assert keeps.stdout is not None
    assert keeps.stdout.readline() == b"said\n"
    found = json.loads(agent.verb("top", "--for", "5s", "--json").stdout)["flows"]
    flows = [flow for flow in found if flow["dport"] == 8080]
    assert {(flow["http_host"], flow["rule"], flow["verdict"]) for flow in flows} == {("a.test", "rule 1 (a)", "accept")}
    assert agent.stop() == 0


def test_a_client_that_begins_beside_another_sees_silent_flows_too(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, NAMES).ready()
    argv = (*top(agent), "--json", "--for")
    netns.start(*argv, "600", stdout=DEVNULL)
    keeps = netns.start(sys.executable, "-c", KEEP, stdout=PIPE)
    assert keeps.stdout is not None
    assert keeps.stdout.readline() == b"said\n"

    def seen() -> list[int]:
        return [flow["dport"] for flow in json.loads(netns.run(*argv, "2").stdout)["flows"]]

    until(lambda: seen() == [8080], "the connection is shown")
    # It says nothing more, and all has been told to the others.
    until(lambda: seen() == [8080], "the connection is shown again")
    assert agent.stop() == 0
