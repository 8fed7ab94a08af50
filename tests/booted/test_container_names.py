"""The packaged unit with its drop-ins names interfaces by the containers of Docker and Podman, and by pods of Podman."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from runtime_contract import keeps_the_contract

from booted.beside import FAR
from booted.container import Container, Layer
from booted.nspawn import until
from booted.peers import drop_in, main_pid, status
from booted.roots import RELEASES
from booted.runtimes import ASK, address, asks, play_pod, pod_address, prepare_podman, run_servers

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
    until(lambda: containers(host) == {None}, "the interfaces are taken, and have no names")
    drop_in(host, "containers")
    host.run("systemctl", "restart", "nfq-agent")
    until(lambda: containers(host) == ids, "they are known by their ids")
    unnamed = f"{socket} does not name containers"
    until(lambda: unnamed in host.journal("--unit=nfq-agent"), "it says that ids are used")
    drop_in(host, tool)
    host.run("systemctl", "restart", "nfq-agent")
    until(lambda: containers(host) == {"web", "asking"}, "they are known by their names")
    # CAP_SYS_PTRACE is 19: the supervisor has it, no worker.
    report = status(host)
    pids = [
        main_pid(host),
        report["taps"][0]["pid"],
        *(worker["pid"] for queue in report["queues"] for worker in queue["workers"]),
    ]
    rights = [int(host.shell(f"sed -n 's/^CapPrm:\t//p' /proc/{pid}/status"), 16) >> 19 & 1 for pid in pids]
    assert rights == [1] + [0] * (len(pids) - 1)


def logged(host: Container, text: str, *fields: str) -> None:
    """Wait for a line of the agent's log that has these fields of the journal."""
    until(lambda: text in host.journal("--unit=nfq-agent", *fields), f"the log has {text!r} with {fields}")


def judged(host: Container, tool: str, web: str) -> None:
    """What one container asks of the other is known by both names, in the log and in a policy."""
    assert asks(host, tool, "asking", web)
    logged(host, f"-> {web}:80 FORWARD accept", "NFQ_CONTAINER=asking", "NFQ_CONTAINER_TO=web", "NFQ_QUEUE=130")
    config = "/etc/nfq-agent/conf.d/names.toml"
    host.shell(f"sed -i 's/dport = 81/dport = 80/' {config}")
    host.run("systemctl", "reload", "nfq-agent")
    assert not asks(host, tool, "asking", web, seconds=3)
    logged(host, "by verdicts: rule 1", "NFQ_CONTAINER_TO=web")
    host.run("systemctl", "stop", "nfq-agent")
    assert asks(host, tool, "asking", web)


def told_by_the_runtime(host: Container, tool: str, socket: str) -> None:
    """Its socket keeps what the agent rests on. From outside, it is reached through the first process's root."""
    ids = {name: host.run(tool, "inspect", "--format={{.Id}}", name).stdout.strip() for name in ("web", "asking")}
    keeps_the_contract(f"/proc/{host.pid}/root{socket}", {number: name for name, number in ids.items()})


def judged_without_ports(host: Container, tool: str, web: str) -> None:
    """Netfilter sees the bridge and no port of it: a container is known by its address there. `far` is another machine."""
    host.shell(FAR + "echo 0 >/proc/sys/net/bridge/bridge-nf-call-iptables")
    host.shell("mkdir -p /srv/bin; cp /bin/busybox /srv/bin/; ip netns exec far busybox httpd -p 80 -h /srv")
    host.shell(f"ip -n far route add {web} via 10.9.0.1; iptables -I FORWARD -i near -j ACCEPT")
    config = "/etc/nfq-agent/conf.d/names.toml"
    host.shell(f"sed -i 's/dport = 80/dport = 81/' {config}")
    host.run("systemctl", "start", "nfq-agent")
    # A container asks elsewhere, and is asked from there.
    until(lambda: asks(host, tool, "asking", "10.9.0.2"), "there is a way out")
    logged(host, "-> 10.9.0.2:80 FORWARD accept", "NFQ_CONTAINER=asking", "NFQ_QUEUE=130")
    far = ("ip", "netns", "exec", "far", "timeout")
    host.run(*far, "60", "bash", "-c", ASK, "ask", web)
    logged(host, "10.9.0.2:", "NFQ_CONTAINER=web", "NFQ_QUEUE=130")
    host.shell(f"sed -i 's/dport = 81/dport = 80/' {config}")
    host.run("systemctl", "reload", "nfq-agent")
    assert host.run(*far, "3", "bash", "-c", ASK, "ask", web, check=False).returncode != 0
    # The rule is about the other container.
    assert asks(host, tool, "asking", "10.9.0.2")


def test_docker(neighboured: tuple[Path, ...]) -> None:
    with Layer(*neighboured) as layer, Container(layer) as host:
        host.run("systemctl", "start", "docker")
        run_servers(host, "docker", "web", "asking")
        host.shell("echo 1 >/proc/sys/net/bridge/bridge-nf-call-iptables")
        named(host, "docker", "/run/docker.sock")
        told_by_the_runtime(host, "docker", "/run/docker.sock")
        judged(host, "docker", address(host, "docker", "web"))
        judged_without_ports(host, "docker", address(host, "docker", "web"))


@pytest.mark.parametrize("release", RELEASES[1:], ids=lambda release: release.name, indirect=True)
def test_podman(with_podman: tuple[Path, ...]) -> None:
    with Layer(*with_podman) as layer, Container(layer) as host:
        prepare_podman(host)
        # As the drop-in says.
        said = host.shell("cat /usr/share/nfq-agent/drop-ins/podman.conf")
        edit = re.findall(r"^#   (.*)", said, re.MULTILINE)
        assert edit[0] == "[Socket]"
        host.write("/etc/systemd/system/podman.socket.d/agent.conf", "\n".join(edit) + "\n")
        host.run("systemctl", "daemon-reload")
        host.run("systemctl", "start", "podman.socket")
        run_servers(host, "podman", "web", "asking")
        host.shell("echo 1 >/proc/sys/net/bridge/bridge-nf-call-iptables")
        named(host, "podman", "/run/podman/podman.sock")
        told_by_the_runtime(host, "podman", "/run/podman/podman.sock")
        judged(host, "podman", address(host, "podman", "web"))
        # A pod has the name of its container, not of the one that holds its namespaces. It comes while the agent runs.
        host.run("systemctl", "start", "nfq-agent")
        play_pod(host, "shop", "cart-0", "app")
        until(lambda: containers(host) == {"web", "asking", "cart-0-app"}, "the pod is known by its container's name")
        pod = pod_address(host, "cart-0")
        assert asks(host, "podman", "asking", pod)
        logged(host, f"-> {pod}:80 FORWARD accept", "NFQ_CONTAINER=asking", "NFQ_CONTAINER_TO=cart-0-app")
        host.shell('sed -i \'s/container = "web"/container = "cart-0-app"/\' /etc/nfq-agent/conf.d/names.toml')
        host.run("systemctl", "reload", "nfq-agent")
        assert not asks(host, "podman", "asking", pod, seconds=3)
        logged(host, "by verdicts: rule 1", "NFQ_CONTAINER_TO=cart-0-app")
        assert asks(host, "podman", "asking", address(host, "podman", "web"))
