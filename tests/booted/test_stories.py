"""The stories of the documentation that need a booted host, as a reader walks through them."""

from __future__ import annotations

from pathlib import Path

import pytest
from story import walk

from booted.beside import FAR, serving
from booted.container import Container, Layer

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
