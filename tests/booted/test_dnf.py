"""The .rpm by dnf from the signed repository: its dependencies are resolved, and its scripts run. No host is booted for it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from booted.container import Layer
from booted.packages import Packages
from booted.repository import repository
from booted.roots import Release, neighbours_root

# No distribution that uses .rpm can be had here. One package stands for Debian's own, with what rpm itself finds in their
# files; so dnf resolves the dependencies against what is really there.
_DEBIAN = r"""
cat >/root/debian.spec <<EOF
Name: debian
Version: 1
Release: 1
Summary: What the packages of this Debian bring
License: none
AutoReqProv: no
Provides: /bin/sh, /usr/bin/python3, iptables, systemd
Provides: $(python3 -c 'import sys; print("python(abi) = %d.%d" % sys.version_info[:2])')
$(find /usr/lib/*-linux-gnu -name '*.so*' -type f | /usr/lib/rpm/elfdeps --provides | sort -u | sed 's/^/Provides: /')
%description
%files
EOF
rpmbuild --quiet -bb --define '_rpmdir /root' /root/debian.spec 2>&1
rpm --install --nodeps /root/*/debian-1-1.*.rpm
"""
_WANTED = "/etc/systemd/system/multi-user.target.wants/nfq-agent.service"


@pytest.fixture
def with_dnf(release: Release, built: Packages, key: str, tmp_path: Path) -> Iterator[Layer]:
    """A root with dnf and the repository."""
    out = repository(built, key, tmp_path)
    with Layer(neighbours_root(release, "dnf", "iptables", "kmod", "libnetfilter-queue1", "rpm")) as layer:
        shutil.copytree(out, layer.root / "srv/out")
        text = (out / "nfq-agent.repo").read_text().replace("http://127.0.0.1:8000", "file:///srv/out")
        (layer.root / "etc/yum.repos.d").mkdir(exist_ok=True)
        (layer.root / "etc/yum.repos.d/nfq-agent.repo").write_text(text)
        yield layer


def test_dnf_installs_and_removes(with_dnf: Layer, built: Packages) -> None:
    # Without the package that stands for Debian's, nothing has what it depends on.
    refused = with_dnf.run("sh", "-c", "dnf install -y nfq-agent 2>&1; true")
    assert "nothing provides libnetfilter_queue.so.1()(64bit)" in refused
    with_dnf.run("sh", "-ec", _DEBIAN)
    said = with_dnf.run("sh", "-ec", "dnf install -y nfq-agent 2>&1")
    assert "Key imported successfully" in refused + said
    assert with_dnf.run("rpm", "--query", "nfq-agent").strip() == built.rpm.name.removesuffix(".rpm")
    assert with_dnf.run("rpm", "--verify", "nfq-agent") == ""
    # The scripts have made the user and enabled the service, as Debian's presets say of all.
    assert with_dnf.run("getent", "passwd", "proxyuser").startswith("proxyuser:x:")
    assert with_dnf.run("readlink", _WANTED).strip().endswith("/lib/systemd/system/nfq-agent.service")
    with_dnf.run("nfq-agent", "check")
    with_dnf.run("sh", "-ec", "echo '# mine' >>/etc/nfq-agent/nfq-agent.toml; dnf reinstall -y nfq-agent 2>&1")
    assert with_dnf.run("tail", "-n", "1", "/etc/nfq-agent/nfq-agent.toml") == "# mine\n"
    with_dnf.run("sh", "-ec", "dnf remove -y nfq-agent 2>&1")
    left = with_dnf.run("sh", "-c", f"ls -d {_WANTED} /usr/lib/nfq-agent /usr/bin/nfq-agent /etc/nfq-agent/* 2>/dev/null; true")
    assert left == "/etc/nfq-agent/nfq-agent.toml.rpmsave\n"
    # The package as it was before the release signed it is refused.
    shutil.copy(built.rpm, with_dnf.root / "srv/out/rpm")
    refused = with_dnf.run("sh", "-c", "dnf install -y nfq-agent 2>&1; rpm --query nfq-agent; true")
    assert "package nfq-agent is not installed" in refused
