"""The unit of one's own of SECURITY.md: with its user, capabilities and folder the agent serves a queue, a proxy and a tap."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from agent import COMMAND, ours, until
from namespace import PATIENCE, Namespace
from reachable import python, reachable

pytestmark = pytest.mark.kernel

PAGE = Path(__file__).parent.parent.parent / "SECURITY.md"
# In the namespace's own /run: the test's folder is root's alone.
CONFIG = "/run/own.toml"
QUEUE = '[queue.main]\nnum = 100\n[rules.app]\nqueue = "main"\ntcp_ports = [11000]\n'
PROXY = '[proxy.tcp]\nlisten = ["127.0.0.1:15002"]\n[rules.proxied]\nproxy = "tcp"\nhooks = ["output"]\ntcp_ports = [8080]\n'
TAP = '[tap.all]\ninterfaces = ["lo"]\n'


def as_the_unit_says(without: str = "") -> list[str]:
    """What runs a command as the unit does. without: a capability that is taken out of it."""
    (unit,) = re.findall(r"```ini\n(.*?)```", PAGE.read_text(), re.DOTALL)
    said = dict(line.split("=", 1) for line in unit.splitlines() if "=" in line and not line.startswith("#"))
    assert said["AmbientCapabilities"] == said["CapabilityBoundingSet"]
    names = [name for name in said["AmbientCapabilities"].split() if name != without]
    sets = ",".join(["-all", *(f"+{name.removeprefix('CAP_').lower()}" for name in names)])
    user = ["setpriv", f"--reuid={said['User']}", f"--regid={said['User']}", "--clear-groups", "--no-new-privs"]
    sandbox = [f"--inh-caps={sets}", f"--ambient-caps={sets}", f"--bounding-set={sets}"]
    return [*user, *sandbox, "env", f"RUNTIME_DIRECTORY=/run/{said['RuntimeDirectory']}"]


@pytest.fixture
def host(netns: Namespace) -> Namespace:
    """A host with the user, the folder and the lock."""
    reachable(netns)
    # The first start makes the user.
    netns.run(*COMMAND, "apply")
    netns.run(*COMMAND, "remove")
    netns.shell("rm -rf /run/nfq-agent; install -d -o proxyuser /run/nfq-agent")
    netns.shell("chgrp proxyuser /run/xtables.lock; chmod 0640 /run/xtables.lock")
    return netns


@pytest.mark.parametrize(
    ("config", "serves"),
    [(QUEUE, "is serving queue 100"), (PROXY, "is serving proxy tcp"), (TAP, "is serving tap all")],
    ids=["queue", "proxy", "tap"],
)
def test_it_serves(host: Namespace, tmp_path: Path, config: str, serves: str) -> None:
    host.run("sh", "-c", f"cat >{CONFIG}", input=config)
    with (tmp_path / "log").open("w+") as log:
        command = [*as_the_unit_says(), *python("-m", "nfq_agent"), "run", "--config", CONFIG]
        process = host.start(*command, stdout=log, stderr=log)
        until(lambda: serves in Path(log.name).read_text() or process.poll() is not None, "it serves")
        assert process.poll() is None, Path(log.name).read_text()
        process.terminate()
        assert process.wait(timeout=PATIENCE) == 0
    assert ours(host) == []


@pytest.mark.parametrize(
    ("without", "config", "said"),
    [
        ("CAP_NET_ADMIN", QUEUE, "CAP_NET_ADMIN is missing: without it no queue and no rule can be made"),
        ("CAP_NET_RAW", TAP, "tap all: it needs CAP_NET_RAW"),
    ],
)
def test_a_missing_capability_is_named(host: Namespace, without: str, config: str, said: str) -> None:
    host.run("sh", "-c", f"cat >{CONFIG}", input=config)
    done = host.run(*as_the_unit_says(without), *python("-m", "nfq_agent"), "run", "--config", CONFIG, check=False)
    assert done.returncode != 0
    assert said in done.stderr
    assert ours(host) == []
