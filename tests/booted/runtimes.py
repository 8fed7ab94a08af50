"""Containers on a booted host with a runtime: each serves its files, and one asks another."""

from __future__ import annotations

from booted.container import Container

PODMAN = ("busybox-static", "crun", "curl", "fuse-overlayfs", "iptables", "netavark", "nftables", "podman", "uidmap")
"""The packages of a host with Podman."""
# The tests' host is an overlay, on which no other can be put, and has no controller for memory and for process numbers.
_STORAGE = '[storage]\ndriver = "vfs"\nrunroot = "/run/containers/storage"\ngraphroot = "/var/lib/containers/storage"\n'
_ENGINE = """[containers]
pids_limit = 0
[engine]
cgroup_manager = "cgroupfs"
infra_image = "localhost/pause"
[network]
firewall_driver = "iptables"
"""
_PAUSE = '#!/bin/busybox sh\ntrap "exit 0" TERM INT\nwhile :; do /bin/busybox sleep 1; done\n'
# The static busybox of Debian 12 crashes in a container when it fetches a file: bash asks.
_IMAGE = """mkdir -p /t/bin; cp /bin/busybox /t/bin/; ln -sf busybox /t/bin/sh
cp --parents -L /bin/bash $(ldd /bin/bash | grep -o '/[^ ]*') /t
"""
ASK = r"""exec 3<>/dev/tcp/$1/80 && printf 'GET /bin/busybox HTTP/1.0\r\n\r\n' >&3 && read -r said <&3 || exit 1
[[ $said == *" 200 "* ]]
"""
"""Run by bash: asks the server at an address for a file."""


def prepare_podman(host: Container) -> None:
    """Give Podman a storage that works on the tests' host, and an image that holds the namespaces of pods."""
    host.shell("mkdir -p /var/lib/containers; mount -t tmpfs -o mode=755 tmpfs /var/lib/containers")
    host.write("/etc/containers/storage.conf", _STORAGE)
    host.write("/etc/containers/containers.conf", _ENGINE)
    host.write("/p/pause", _PAUSE)
    host.shell("chmod +x /p/pause; mkdir /p/bin; cp /bin/busybox /p/bin; tar -C /p -c . | podman import --quiet "
               "--change 'ENTRYPOINT [\"/pause\"]' - pause")  # fmt: skip


def make_image(host: Container, runtime: str) -> None:
    """Make the image `bb`."""
    host.shell(f"{_IMAGE}tar -C /t -c . | {runtime} import - bb")


def run_servers(host: Container, runtime: str, *names: str) -> None:
    """Start containers on the runtime's bridge; each serves its files on port 80."""
    make_image(host, runtime)
    for name in names:
        serve = ("/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/")
        host.run(runtime, "run", "--detach", f"--name={name}", "bb", *serve)


def address(host: Container, runtime: str, name: str) -> str:
    """Of a container."""
    shown = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
    return host.run(runtime, "inspect", f"--format={shown}", name).stdout.strip()


def asks(host: Container, runtime: str, name: str, server: str, seconds: int = 60) -> bool:
    """Whether a container gets a file from the server at this address within `seconds`."""
    words = ("/bin/busybox", "timeout", str(seconds), "/bin/bash", "-c", ASK, "ask", server)
    return host.run(runtime, "exec", name, *words, check=False, timeout=seconds + 60).returncode == 0


def play_pod(host: Container, namespace: str, name: str, container: str) -> str:
    """Run a pod of one container of `bb` from a file of Kubernetes, on the bridge of other containers. Returns the container's
    id."""
    host.write(
        f"/srv/{name}.yaml",
        f"""apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  containers:
    - name: {container}
      image: localhost/bb
      imagePullPolicy: Never
      command: [/bin/busybox, httpd, -f, -p, "80", -h, /]
""",
    )
    host.run("podman", "kube", "play", "--network=podman", f"/srv/{name}.yaml")
    return host.run("podman", "inspect", "--format={{.Id}}", f"{name}-{container}").stdout.strip()


def pod_address(host: Container, name: str) -> str:
    """Of a pod: that of the container that holds its namespaces."""
    holder = host.run("podman", "pod", "inspect", "--format={{.InfraContainerID}}", name).stdout.strip()
    return address(host, "podman", holder)
