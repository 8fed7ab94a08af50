"""The packaged unit with its drop-ins names interfaces by the containers of Docker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from booted.container import Container, Layer
from booted.nspawn import until
from booted.peers import drop_in, main_pid, status
from booted.roots import RELEASES
from booted.runtimes import address, run_servers

_CONFIG = """
[agent]
container_sockets = ["{socket}"]
[tap.pods]
interfaces = ["veth*"]
elements = ["log"]
[queue.l7]
num = 130
elements = ["verdicts", "log"]
[rules.apps]
queue = "l7"
hooks = ["forward"]
tcp_ports = [80]
[element.verdicts]
type = "policy"
default = "accept"
rule = [ {{ action = "drop", container = "web", dport = 81 }} ]
[element.log]
each = "flow"
"""
_ASK = "busybox wget -q -T 2 -O /dev/null http://{address}/bin/busybox"


def containers(host: Container) -> set[str | None]:
    """Behind the interfaces of the tap."""
    found: list[dict[str, Any]] = status(host)["taps"][0]["interfaces"]
    return {each["container"] for each in found}


def named(host: Container, tool: str, socket: str) -> None:
    """Container `web` runs, and `asking`; the socket of the runtime is there."""
    ids = {host.run(tool, "inspect", "--format={{.Id}}", name).stdout.strip()[:12] for name in ("web", "asking")}
    host.run("systemctl", "stop", "nfq-agent")
    host.write("/etc/nfq-agent/conf.d/names.toml", _CONFIG.format(socket=socket))
    drop_in(host, "tap")
    host.run("systemctl", "start", "nfq-agent")
    until(
        lambda: "allowed: CAP_SYS_PTRACE (the drop-in containers.conf" in host.journal("--unit=nfq-agent"),
        "it says what is missing",
    )
    assert containers(host) == {None}
    drop_in(host, "containers")
    host.run("systemctl", "restart", "nfq-agent")
    until(lambda: containers(host) == ids, "they are known by their ids", 30)
    assert f"{socket} does not name containers" in host.journal("--unit=nfq-agent")
    drop_in(host, tool)
    host.run("systemctl", "restart", "nfq-agent")
    until(lambda: containers(host) == {"web", "asking"}, "they are known by their names", 30)
    # CAP_SYS_PTRACE is 19: the supervisor has it, no worker.
    report = status(host)
    pids = [
        main_pid(host),
        report["taps"][0]["pid"],
        *(worker["pid"] for queue in report["queues"] for worker in queue["workers"]),
    ]
    rights = [int(host.shell(f"sed -n 's/^CapPrm:\t//p' /proc/{pid}/status"), 16) >> 19 & 1 for pid in pids]
    assert rights == [1] + [0] * (len(pids) - 1)


def judged(host: Container, tool: str, web: str) -> None:
    """What one container asks of the other is known by both names, in the log and in a policy."""
    ask = _ASK.format(address=web)
    host.run(tool, "exec", "asking", "/bin/sh", "-c", ask)
    until(lambda: f"-> {web}:80" in host.journal("--unit=nfq-agent", "NFQ_CONTAINER=asking"), "the log names it", 30)
    found = host.journal("--unit=nfq-agent", "NFQ_CONTAINER=asking", "NFQ_CONTAINER_TO=web", "NFQ_QUEUE=130")
    assert f"-> {web}:80 FORWARD accept" in found
    config = "/etc/nfq-agent/conf.d/names.toml"
    host.shell(f"sed -i 's/dport = 81/dport = 80/' {config}")
    host.run("systemctl", "reload", "nfq-agent")
    assert host.run(tool, "exec", "asking", "/bin/sh", "-c", ask, check=False).returncode != 0
    assert "by verdicts: rule 1" in host.journal("--unit=nfq-agent", "NFQ_CONTAINER_TO=web")
    host.run("systemctl", "stop", "nfq-agent")
    host.run(tool, "exec", "asking", "/bin/sh", "-c", ask)


# In containers on Debian 12 its static busybox crashes when it fetches a file.
@pytest.mark.parametrize("release", RELEASES[1:], ids=lambda release: release.name, indirect=True)
def test_docker(neighboured: tuple[Path, ...]) -> None:
    with Layer(*neighboured) as layer, Container(layer) as host:
        host.run("systemctl", "start", "docker", timeout=120)
        run_servers(host, "docker", "web", "asking")
        host.shell("echo 1 >/proc/sys/net/bridge/bridge-nf-call-iptables")
        named(host, "docker", "/run/docker.sock")
        judged(host, "docker", address(host, "docker", "web"))
