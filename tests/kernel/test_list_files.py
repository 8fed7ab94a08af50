"""Lists of networks and names in files, that a running agent reads again, with real clients."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from agent import Agent, until
from namespace import Namespace

pytestmark = pytest.mark.kernel
CONFIG = """
[queue.main]
elements = ["dpi", "gate"]
[element.gate]
type = "policy"
default = "accept"
rule = [{{ action = "reject", {key} = "file:list.txt", dport = 11000 }}]
[rules.app]
queue = "main"
hooks = ["input"]
role = "server"
tcp_ports = [11000]
"""
BLOCKED = {"dst": "127.0.0.0/8", "http_host": "*.blocked.test"}
OTHER = {"dst": "192.0.2.0/24", "http_host": "other.test"}
# In the form of another list; what is said of it.
BAD = {
    "dst": ("localhost", "'localhost' is not a valid network"),
    "http_host": ("0.0.0.0 www.blocked.test", "as lines of a hosts file"),
}


def serve(netns: Namespace, folder: Path) -> None:
    folder.mkdir()
    (folder / "page").write_text("hello")
    server = netns.start(
        sys.executable, "-u", "-m", "http.server", "11000", "--bind", "127.0.0.1", "-d", str(folder), stdout=subprocess.PIPE
    )
    assert server.stdout is not None
    assert server.stdout.readline()


def answered(netns: Namespace) -> bool:
    """Whether a real client gets the page, by the name that some of the lists have."""
    url = "http://127.0.0.1:11000/page"
    done = netns.run("curl", "-s", "-m", "30", "-H", "Host: www.blocked.test", url, check=False)
    return done.stdout == "hello"


@pytest.mark.parametrize("key", ["dst", "http_host"])
def test_a_list_is_read_again_when_it_changes_and_a_bad_one_is_not_taken(netns: Namespace, tmp_path: Path, key: str) -> None:
    path = tmp_path / "list.txt"
    path.write_text(f"{OTHER[key]}\n")
    serve(netns, tmp_path / "www")
    agent = Agent(netns, tmp_path, CONFIG.format(key=key)).ready()
    assert answered(netns)

    entry, said = BAD[key]
    path.write_text(f"{OTHER[key]}\n{entry}\n")
    until(lambda: said in agent.log, "the bad list is refused")
    assert answered(netns)
    assert "file:list.txt, line 2: " in agent.log
    assert "reload refused, the configuration in force stays: " in agent.log
    assert agent.log.count(said) == 1, "it is not tried again before it changes"

    path.write_text(f"{OTHER[key]}\n{BLOCKED[key]}")
    until(lambda: not answered(netns), "the new list is in force")

    path.unlink()
    until(lambda: "list.txt: cannot be read: No such file or directory" in agent.log, "it is gone")
    assert not answered(netns)
    path.mkdir()
    until(lambda: "list.txt: cannot be read: Is a directory" in agent.log, "it is a folder")
    assert not answered(netns)
    path.rmdir()
    path.write_text("# nothing any more\n")
    until(lambda: "file:list.txt has no entry" in agent.log, "it is empty")
    assert not answered(netns)

    new = tmp_path / "new.txt"
    new.write_bytes(f"\ufeff# as an editor of another system writes it\r\n{OTHER[key]}\r\n{OTHER[key]}\r\n".encode())
    new.rename(path)
    until(lambda: answered(netns), "another list took its place")
    assert agent.stop() == 0
