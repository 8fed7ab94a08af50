"""Fixtures of the kernel tests."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from control_groups import leave
from namespace import Namespace
from proxied import Proxied, configuration
from resident import Resident

from nfq_agent.host.cgroups import mounted


@pytest.fixture
def run(netns: Namespace, tmp_path: Path) -> Iterator[Callable[..., Proxied]]:
    """Start proxies from configurations; they are ended, and have to have ended well."""
    with contextlib.ExitStack() as stack:

        def start(text: str = "", namespace: Namespace = netns, **options: Any) -> Proxied:
            return stack.enter_context(Proxied(namespace, tmp_path, text or configuration(), **options))

        yield start


@pytest.fixture
def resident(netns: Namespace) -> Iterator[Resident]:
    """A process in the namespace of the test."""
    made = Resident(netns)
    yield made
    made.kill()


@pytest.fixture
def groups() -> Iterator[tuple[Path, str]]:
    """The root of control groups and a tag; in it a service `payments-TAG`, another, `other-TAG`, and the container `web-TAG`."""
    root = mounted()
    if root is None:
        pytest.skip("no control groups of version 2 are mounted")
    tag = uuid.uuid4().hex[:8]
    made = [root / f"payments-{tag}.service", root / f"machine-web\\x2d{tag}.scope", root / f"other-{tag}.service"]
    for group in made:
        group.mkdir()
    yield root, tag
    for group in made:
        leave(group)


@pytest.fixture
def routed(netns: Namespace) -> Iterator[tuple[Namespace, Namespace, Namespace]]:
    """A client, a router and a server behind it: 10.1.0.2 - 10.1.0.1 | 10.2.0.1 - 10.2.0.2, and the same with fd01:, fd02:."""
    with Namespace() as client, Namespace() as target:
        for number, host in ((1, client), (2, target)):
            netns.run("ip", "link", "add", f"eth{number}", "type", "veth", "peer", "name", "eth0", "netns", str(host.pid))
            for end, device, last in ((netns, f"eth{number}", 1), (host, "eth0", 2)):
                end.run("ip", "address", "add", f"10.{number}.0.{last}/24", "dev", device)
                end.run("ip", "-6", "address", "add", f"fd0{number}::{last}/64", "dev", device, "nodad")
                end.run("ip", "link", "set", device, "up")
            host.run("ip", "route", "add", "default", "via", f"10.{number}.0.1")
            host.run("ip", "-6", "route", "add", "default", "via", f"fd0{number}::1")
        netns.shell("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")
        yield client, netns, target
