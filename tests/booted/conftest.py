"""Hosts that several tests share: made once in a session, with the package installed; each test gets a fresh boot of one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from booted.container import Container, Layer, sweep
from booted.nspawn import checked, until
from booted.packages import Installed, Packages, packages
from booted.roots import RELEASES, Release, base_root, neighbours_root
from booted.runtimes import PODMAN

HERE = Path(__file__).parent
_NEIGHBOURS = ("busybox-static", "docker.io", "fail2ban", "firewalld", "nftables", "ufw")
# Debian 12 has Docker's client in docker.io.
_BESIDES = {"trixie": ("docker-cli",)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here boots, or builds for, a host."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("booted")
            # Fixtures do not count: the first ones of a machine build roots and packages, each command with its timeout.
            item.add_marker(pytest.mark.timeout(1200, func_only=True))


@pytest.fixture(scope="session", params=RELEASES, ids=lambda release: release.name)
def release(request: pytest.FixtureRequest) -> Release:
    """A Debian release."""
    if os.geteuid() != 0:
        pytest.fail(
            "the booted tests make and boot containers: run them as root, or leave them out with tests/run --unit or --kernel"
        )
    sweep()
    found: Release = request.param
    return found


@pytest.fixture(scope="session")
def built(release: Release) -> Packages:
    """The packages of the working tree, for the release."""
    return packages(release)


@pytest.fixture(scope="session")
def installed(release: Release, built: Packages) -> Iterator[Installed]:
    """Install on a booted minimal host, note what came of it, and keep what was written."""
    base = base_root(release)
    with Layer(base) as layer:
        shutil.copy(built.deb, layer.root / "root")
        with Container(layer) as host:
            done = host.run("sh", "-c", f"apt-get install -y /root/{built.deb.name} 2>&1", timeout=900)
            state = host.show("nfq-agent", "ActiveState")
            enabled = host.run("systemctl", "is-enabled", "nfq-agent", check=False).stdout.strip()
            rules = host.shell("iptables-legacy-save -t mangle; ip6tables-legacy-save -t mangle")
            host.power_off()
        layer.detach()
        yield Installed((layer.changes, base), done.stdout, state, enabled, rules)


def _made(built: Packages, *neighbours: str) -> Iterator[tuple[Path, ...]]:
    """The layers of a host of a release with neighbours and the package installed."""
    base = neighbours_root(built.release, *neighbours)
    deb = built.deb
    with Layer(base) as layer:
        shutil.copy(deb, layer.root / "root")
        with Container(layer) as host:
            host.run("apt-get", "install", "-y", f"/root/{deb.name}", timeout=900)
            host.power_off()
        layer.detach()
        yield layer.changes, base


@pytest.fixture(scope="session")
def neighboured(built: Packages) -> Iterator[tuple[Path, ...]]:
    yield from _made(built, *_NEIGHBOURS, *_BESIDES.get(built.release.name, ()))


@pytest.fixture(scope="session")
def with_podman(built: Packages) -> Iterator[tuple[Path, ...]]:
    yield from _made(built, *PODMAN)


@pytest.fixture(scope="session")
def persistent(built: Packages) -> Iterator[tuple[Path, ...]]:
    yield from _made(built, "iptables-persistent", "nftables")


@pytest.fixture(scope="session")
def with_cryptography(built: Packages) -> Iterator[tuple[Path, ...]]:
    yield from _made(built, "python3-cryptography")


@pytest.fixture(scope="session")
def with_journal_remote(built: Packages) -> Iterator[tuple[Path, ...]]:
    yield from _made(built, "systemd-journal-remote")


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The fingerprint of a key that is made for the test, from before the commit that it signs."""
    home = tmp_path / "gnupg"
    home.mkdir(mode=0o700)
    monkeypatch.setenv("GNUPGHOME", str(home))
    generate = ["--faked-system-time", "20200101T000000!", "--passphrase", "", "--quick-gen-key", "test <test@nfq-agent.example>"]
    checked(["gpg", "--batch", "--quiet", *generate, "rsa3072", "sign", "never"])
    listed = checked(["gpg", "--batch", "--with-colons", "--list-secret-keys"])
    yield listed.split("\nfpr:")[1].split(":")[8]
    checked(["gpgconf", "--kill", "all"])


@pytest.fixture
def host(installed: Installed) -> Iterator[Container]:
    """A fresh boot of the host with the package; its service has come up with it."""
    with Layer(*installed.lower) as layer, Container(layer) as container:
        until(lambda: container.show("nfq-agent", "ActiveState") == "active", "nfq-agent is active after the boot")
        yield container
