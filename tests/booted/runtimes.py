"""Containers of busybox on a booted host with a runtime."""

from __future__ import annotations

from booted.container import Container


def run_servers(host: Container, runtime: str, *names: str) -> None:
    """Start containers on the runtime's bridge; each serves its files on port 80."""
    make = "mkdir -p /t/bin; cp /bin/busybox /t/bin/; ln -s busybox /t/bin/sh; tar -C /t -c . | "
    host.shell(f"{make} {runtime} import - bb", timeout=120)
    for name in names:
        serve = ("/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/")
        host.run(runtime, "run", "--detach", f"--name={name}", "bb", *serve, timeout=120)


def address(host: Container, runtime: str, name: str) -> str:
    """Of a container."""
    shown = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
    return host.run(runtime, "inspect", f"--format={shown}", name).stdout.strip()
