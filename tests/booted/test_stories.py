"""The stories of the documentation that need a booted host, as a reader walks through them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from story import walk

from booted.beside import FAR, serving
from booted.container import Container, Layer
from booted.packages import Packages
from booted.roots import base_root

# The other machine serves web pages, under two names.
_OTHER = """
mkdir -p /srv/web
echo hello >/srv/web/index.html
echo '10.9.0.2 api.example evil.example' >>/etc/hosts
ip netns exec far busybox httpd -p 80 -h /srv/web
"""
# What the story calls the image `web`.
_DOCKER = """
systemctl start docker
mkdir -p /t/bin /t/www
cp /bin/busybox /t/bin/
echo hello >/t/www/index.html
tar -C /t -c . | docker import -c 'CMD ["/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/www"]' - web
"""


@pytest.mark.parametrize(("story", "before"), [("story-docker", _DOCKER), ("story-egress", "")])
def test_a_reader_s_walk(neighboured: tuple[Path, ...], story: str, before: str) -> None:
    with Layer(*neighboured) as layer, Container(layer) as host:
        serving(host)
        host.shell(FAR + _OTHER + before, timeout=180)
        walk(story, host.write, host.command(["bash"]), host.command(["ip", "netns", "exec", "far", "bash"]))


def test_a_first_hour(built: Packages) -> None:
    """docs/getting-started.md, from the package to a host without it."""
    with Layer(base_root(built.release)) as layer:
        shutil.copy(built.deb, layer.root / "root")
        with Container(layer) as host:
            walk("getting-started", host.write, host.command(["env", "--chdir=/root", "bash"]), host.command(["bash"]))
            assert "nfq-agent" not in host.shell("iptables-legacy-save; ip6tables-legacy-save")
