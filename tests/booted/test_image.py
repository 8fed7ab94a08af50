"""The container image: built without root, run by Podman on a booted host, also from the DaemonSet; nothing is left of it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaged import manifest

from booted.container import Container, Layer
from booted.nspawn import until
from booted.packages import TOP, Packages
from booted.roots import RELEASES, base_root, made_once, neighbours_root
from booted.runtimes import PODMAN, address, make_image, play_pod, pod_address, prepare_podman

# One release is enough: the image suits none of the host's. Debian 12's Podman has no quadlets.
pytestmark = pytest.mark.parametrize("release", RELEASES[1:], ids=lambda release: release.name, indirect=True)
# The most that the image may hold, in bytes.
_MOST = 60_000_000
_RUN = (
    "--read-only",
    "--cap-drop=all",
    "--cap-add=net_admin,net_raw",
    "--network=host",
    "--security-opt=no-new-privileges",
)


@pytest.fixture(scope="session")
def image(built: Packages) -> Path:
    """The image as an archive, built by a user without rights and without a network."""
    base = base_root(built.release)
    files = sorted((TOP / "packaging/image").iterdir())
    wanted = hashlib.sha256(built.deb.read_bytes() + b"".join(file.read_bytes() for file in files)).hexdigest()[:12]

    def make(folder: Path) -> None:
        with Layer(neighbours_root(built.release, *PODMAN)) as layer, Container(layer) as host:
            host.shell("useradd builder; mkdir -p /home/builder /run/user/1000; mount -t tmpfs -o mode=755 tmpfs /home/builder")
            host.write("/home/builder/.config/containers/storage.conf", '[storage]\ndriver = "vfs"\n')
            host.shell("chown -R builder: /home/builder /run/user/1000; mkdir -p /srv/nfq-agent/packaging")
            shutil.copytree(TOP / "packaging/image", layer.root / "srv/nfq-agent/packaging/image")
            shutil.copy(built.deb, layer.root / "srv")
            become = ["setpriv", "--reuid=builder", "--regid=builder", "--init-groups", "env", "HOME=/home/builder"]
            become += ["XDG_RUNTIME_DIR=/run/user/1000", "NFQ_AGENT_BUILD_OPTIONS=--isolation=chroot"]
            with subprocess.Popen(["tar", "-C", str(base), "-c", "."], stdout=subprocess.PIPE) as tar:
                host.run(*become, "podman", "import", "-", "localhost/debian", stdin=tar.stdout)
            script = "/srv/nfq-agent/packaging/image/build"
            host.run(*become, script, "--base", "localhost/debian", "--deb", f"/srv/{built.deb.name}", timeout=900)
            host.run(*become, "podman", "save", "--quiet", "--output=/home/builder/image.tar", "nfq-agent:latest")
            (folder / "image.tar").write_bytes(Path(f"/proc/{host.pid}/root/home/builder/image.tar").read_bytes())

    return made_once(f"{built.release.name}-packages-image-{wanted}", make) / "image.tar"


@pytest.fixture
def podman(built: Packages, image: Path) -> Iterator[Container]:
    """A booted host with Podman, the image, and a container `web` on its bridge."""
    with Layer(neighbours_root(built.release, *PODMAN)) as layer, Container(layer) as host:
        prepare_podman(host)
        shutil.copy(image, layer.root / "srv/image.tar")
        host.run("podman", "load", "--quiet", "--input", "/srv/image.tar")
        yield host


def traces(host: Container) -> str:
    """Rules and packet sockets of the host."""
    saved = host.shell("iptables-legacy-save; ip6tables-legacy-save; nft list tables; tail -n +2 /proc/net/packet")
    return "\n".join(line for line in saved.splitlines() if "nfq" in line.lower() or re.match(r"[0-9a-f]{16} ", line))


def status(host: Container, name: str) -> dict[str, Any]:
    done = host.run("podman", "exec", name, "/usr/bin/nfq-agent", "status", "--json", check=False)
    found: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
    return found


def assert_few_rights(host: Container, name: str) -> None:
    """No process of the container is root's or could have more than CAP_NET_ADMIN and CAP_NET_RAW."""
    shown = host.run("podman", "container", "top", name, "pid", "huser", "capbnd", "capeff").stdout.splitlines()[1:]
    assert len(shown) > 1
    for _, user, *sets in (re.split(r"  +", line.strip()) for line in shown):
        assert user == "61000"
        # A worker of a tap has given up all that it had: "none".
        assert {each for words in sets for each in words.split(",")} <= {"NET_ADMIN", "NET_RAW", "none"}


def test_a_read_only_container_judges_and_a_kill_leaves_nothing(podman: Container) -> None:
    host = podman
    (shown,) = json.loads(host.run("podman", "image", "inspect", "nfq-agent").stdout)
    assert shown["Size"] < _MOST
    assert shown["Config"]["Entrypoint"] == ["/usr/bin/nfq-agent"]
    host.run("podman", "run", "--detach", "--name=agent", *_RUN, "nfq-agent")
    until(lambda: status(host, "agent"), "it serves")
    assert_few_rights(host, "agent")
    assert host.run("podman", "exec", "agent", "/bin/sh", check=False).returncode != 0
    host.run("systemd-run", "--unit=web", "busybox", "httpd", "-f", "-p", "11000", "-h", "/usr")
    until(
        lambda: host.run("curl", "-sf", "http://127.0.0.1:11000/bin/busybox", "-o", "/dev/null", check=False).returncode == 0,
        "web",
    )
    (worker,) = status(host, "agent")["queues"][0]["workers"]
    assert worker["accepted"] > 0
    assert traces(host)
    host.run("podman", "kill", "agent")
    until(lambda: not traces(host), "the kernel has removed what was its")
    assert host.run("podman", "exec", "agent", "/usr/bin/nfq-agent", "status", check=False).returncode != 0


def play(host: Container, text: str) -> str:
    """Play this manifest, without limits, for which the tests' host has no controller. Returns the name of the container."""
    host.write("/srv/nfq-agent.yaml", re.sub(r" +resources:\n +requests:.*\n +limits:.*\n", "", text))
    host.run("podman", "kube", "play", "/srv/nfq-agent.yaml")
    return "nfq-agent-pod-nfq-agent"


def fetch(host: Container, server: str) -> None:
    """Get a file from the server at this address, which may not listen yet."""
    host.run("curl", "-sf", "--retry", "20", "--retry-connrefused", "-o", "/dev/null", f"http://{server}/bin/busybox")


def test_the_daemonset_reloads_and_leaves_nothing(podman: Container) -> None:
    host = podman
    host.run(
        "podman", "run", "--detach", "--name=web", "--entrypoint=/bin/busybox", "pause", "httpd", "-f", "-p", "80", timeout=60
    )
    pod = play(host, manifest())

    def containers() -> list[str | None]:
        found = status(host, pod)
        return [each["container"] for each in found["taps"][0]["interfaces"]] if found else []

    # Without the right to look at other processes an interface has no name; its packets are seen as well.
    until(lambda: containers() == [None], "the interface is taken")
    assert_few_rights(host, pod)

    def judged() -> int:
        found = status(host, pod)
        return int(found["taps"][0]["counters"]["judged"]) if found else 0

    seen = judged()
    fetch(host, address(host, "podman", "web"))
    until(lambda: judged() > seen, "its packets are seen")
    # As the kubelet changes a ConfigMap: all of it at once, by a link.
    volume = host.run("podman", "volume", "inspect", "--format={{.Mountpoint}}", "nfq-agent").stdout.strip()
    host.shell(f"cd {volume}; mkdir ..2; sed 's/\"veth\\*\"/\"none*\"/' nfq-agent.toml >..2/nfq-agent.toml; ln -s ..2 ..data; "
               "ln -s ..data/nfq-agent.toml new; mv new nfq-agent.toml")  # fmt: skip
    until(lambda: status(host, pod) and not containers(), "the changed configuration is in force")
    host.run("podman", "pod", "kill", "nfq-agent-pod")
    until(lambda: not traces(host), "nothing is left of the pod")
    host.run("podman", "kube", "down", "/srv/nfq-agent.yaml")


def test_the_daemonset_judges_by_the_names_of_pods(podman: Container) -> None:
    """Podman runs the pods. What the kubelet of a node makes beside them are the names of logs: they are made here."""
    host = podman
    make_image(host, "podman")
    number = play_pod(host, "shop", "cart-0", "app")
    host.shell(f"mkdir -p /var/log/containers; touch /var/log/containers/cart-0_shop_app-{number}.log")
    text = manifest(with_names=True)
    policy = """
    [element.verdicts]
    type = "policy"
    default = "accept"
    rule = [ { action = "drop", container = "shop/cart-0", dport = 80 } ]
    [element.log]
    each = "flow"
"""
    changed = text.replace('elements = ["log"]\n', 'elements = ["verdicts", "log"]\n' + policy.lstrip("\n"))
    assert changed != text
    agent = play(host, changed)

    def tap() -> dict[str, Any]:
        found = status(host, agent)
        return found["taps"][0] if found else {"interfaces": [], "counters": {"would_drop": 0}}

    until(lambda: [each["container"] for each in tap()["interfaces"]] == ["shop/cart-0"], "the pod is known by its name")
    assert tap()["counters"]["would_drop"] == 0
    pod = pod_address(host, "cart-0")
    # A tap drops nothing.
    fetch(host, pod)
    until(lambda: tap()["counters"]["would_drop"] > 0, "the policy names the pod")
    line = re.compile(rf"-> {pod}:80 .*shop/cart-0")
    until(lambda: line.search(host.run("podman", "logs", agent).stderr), "its line in the log names the pod")


def test_a_runtime_that_gives_no_ambient_capabilities(podman: Container) -> None:
    """As runtimes of Kubernetes start a container: its user is not root and has by itself no capability after exec(2)."""
    host = podman
    host.run("podman", "create", "--name=made", *_RUN, "nfq-agent")
    host.run("podman", "init", "made")
    shown = host.run("podman", "inspect", "--format={{.OCIConfigPath}}", "made").stdout.strip()
    config = json.loads(host.shell(f"cat {shown}"))
    capabilities = config["process"]["capabilities"]
    assert set(capabilities["ambient"]) == {"CAP_NET_ADMIN", "CAP_NET_RAW"}
    capabilities["ambient"], capabilities["inheritable"] = [], []
    assert config["process"]["noNewPrivileges"]
    config["linux"]["cgroupsPath"] = "/plain"
    host.write("/srv/plain/config.json", json.dumps(config))
    owner = Path("/dev/null").stat().st_uid
    # crun gives what it has as standard streams to the container's user: /dev/null is that of the machine.
    host.write("/srv/plain/input", "")
    given = "</srv/plain/input >>/srv/plain/log 2>&1"
    host.shell(f"crun run --detach --bundle=/srv/plain --pid-file=/srv/pid plain {given}")

    def serves() -> bool:
        return host.run("sh", "-c", f"crun exec plain /usr/bin/nfq-agent status {given}", check=False).returncode == 0

    until(serves, "it serves")
    assert traces(host)
    sets = dict(re.findall(r"^(\w+):\s+(\S+)", host.shell("cat /proc/$(cat /srv/pid)/status"), re.MULTILINE))
    two = 1 << 12 | 1 << 13
    assert (sets["Uid"], int(sets["CapEff"], 16), int(sets["CapBnd"], 16), int(sets["CapAmb"], 16)) == ("61000", two, two, 0)
    host.run("crun", "kill", "plain", "KILL")
    until(lambda: not traces(host), "the kernel has removed what was its")
    host.run("crun", "delete", "--force", "plain")
    assert Path("/dev/null").stat().st_uid == owner


def test_podman_reads_the_quadlet(podman: Container) -> None:
    host = podman
    host.write("/etc/containers/systemd/nfq-agent-container.container",
               (TOP / "packaging/quadlet/nfq-agent-container.container").read_text())  # fmt: skip
    host.run("systemctl", "daemon-reload")
    host.write("/etc/nfq-agent/nfq-agent.toml", '[agent]\nbackend = "owned"\n[queue.main]\nnum = 100\n')
    host.run("systemctl", "start", "nfq-agent-container")
    until(lambda: status(host, "nfq-agent"), "it serves")
    assert_few_rights(host, "nfq-agent")
    host.run("systemctl", "reload", "nfq-agent-container")
    host.run("systemctl", "stop", "nfq-agent-container")
    assert traces(host) == ""


def test_the_demo_says_why_it_does_not_run_in_the_image(podman: Container) -> None:
    host = podman
    before = traces(host)
    options = ("--rm", "--network=none", "--security-opt=no-new-privileges")
    for user, missing in (((), "takes root"), (("--user=0",), "CAP_SYS_ADMIN")):
        done = host.run("podman", "run", *options, *user, "nfq-agent", "demo", check=False)
        assert (done.returncode, missing in done.stderr) == (1, True), done.stdout + done.stderr
    # The image has what the agent needs, and no more.
    done = host.run("podman", "run", *options, "--user=0", "--privileged", "nfq-agent", "demo", check=False)
    assert (done.returncode, "the program mount is not installed" in done.stdout + done.stderr) == (1, True), done.stdout
    assert traces(host) == before
