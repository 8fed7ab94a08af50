"""What packaging/release makes: hosts install from it over HTTP, upgrade, go back to the version before, and purge."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from booted.container import Container, Layer
from booted.nspawn import checked, until
from booted.packages import TOP, Packages
from booted.peers import exchange, main_pid, ours, steady
from booted.roots import Release, base_root

_NEXT = "9.0.0"


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


def release_of(source: Path, key: str, out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(source / "packaging/release"), "--key", key, "--out", str(out), "--url", "http://127.0.0.1:8000", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)


def at_next_version(clone: Path) -> None:
    """Commit and tag the next version in a clone."""
    for name, before, after in (
        ("pyproject.toml", r'^version = ".*"', f'version = "{_NEXT}"'),
        ("packaging/debian/changelog", r"\A.*\(.*?\)", f"nfq-agent ({_NEXT})"),
        ("packaging/rpm/changelog.yaml", r"\A- semver: .*", f"- semver: {_NEXT}"),
        ("CHANGELOG.md", r"^## Unreleased", f"## {_NEXT} - 2030-01-01"),
    ):
        text, count = re.subn(before, after, (clone / name).read_text(), count=1, flags=re.MULTILINE)
        assert count == 1, name
        (clone / name).write_text(text)
    who = ["-c", "user.name=test", "-c", "user.email=test@nfq-agent.example"]
    checked(["git", "-C", str(clone), *who, "commit", "--quiet", "--all", "--message", "next"])
    checked(["git", "-C", str(clone), "tag", f"v{_NEXT}"])


def raised(deb: Path, folder: Path, version: str) -> None:
    """The same package as one of another version, also for the agent itself."""
    tree = folder / "tree"
    checked(["dpkg-deb", "--raw-extract", str(deb), str(tree)])
    (metadata,) = tree.glob("usr/lib/nfq-agent/nfq_agent-*.dist-info/METADATA")
    metadata.write_text(re.sub(r"^Version: .*", f"Version: {_NEXT}", metadata.read_text(), count=1, flags=re.MULTILINE))
    control = tree / "DEBIAN/control"
    control.write_text(re.sub(r"^Version: [^~\n]*", f"Version: {version}", control.read_text(), count=1, flags=re.MULTILINE))
    target = folder / "packages" / re.sub(r"_.*?~", f"_{version}~", deb.name, count=1)
    target.parent.mkdir()
    checked(["dpkg-deb", "--build", "--root-owner-group", str(tree), str(target)])


def test_a_host_follows_the_repository(release: Release, built: Packages, key: str, tmp_path: Path) -> None:
    (version,) = re.findall(r'^version = "(.*)"$', (TOP / "pyproject.toml").read_text(), re.MULTILINE)
    # The working tree's repository may get commits meanwhile.
    out, clone = tmp_path / "out", tmp_path / "clone"
    checked(["git", "clone", "--quiet", "--shared", str(TOP), str(clone)])
    done = release_of(clone, key, out, "--version", version, str(built.folder))
    assert done.returncode == 0, done.stderr
    assert checked(["git", "-C", str(clone), "rev-parse", "HEAD"]).strip() in done.stdout
    checked(["sha256sum", "--check", "--strict", f"{version}/SHA256SUMS"], cwd=out)
    checked(["gpg", "--batch", "--verify", str(out / version / "SHA256SUMS.asc"), str(out / version / "SHA256SUMS")])
    assert '"pydantic' in (out / version / f"nfq-agent-{version}.cdx.json").read_text()
    again = tmp_path / "again"
    assert release_of(clone, key, again, "--version", version, str(built.folder)).returncode == 0
    checked(["diff", "--recursive", str(out), str(again)])
    # Another version than that of the commit is refused.
    refused = release_of(clone, key, tmp_path / "other", "--version", _NEXT, str(built.folder))
    assert (refused.returncode, refused.stderr) == (2, f"release: pyproject.toml is at version {version}, not at {_NEXT}\n")

    with Layer(base_root(release)) as layer, Container(layer) as host:
        serve = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(out), "8000"]
        with subprocess.Popen(["nsenter", f"--target={host.pid}", "--net", *serve], stderr=subprocess.DEVNULL) as server:
            try:
                follow(host, release, version, built, key, out)
            finally:
                server.terminate()


def follow(host: Container, release: Release, version: str, built: Packages, key: str, out: Path) -> None:
    keyring = host.root / "usr/share/keyrings/nfq-agent-archive-keyring.gpg"
    keyring.write_bytes((out / "nfq-agent-archive-keyring.gpg").read_bytes())
    sources = (out / f"nfq-agent-{release.name}.sources").read_text()
    only = "-o Dir::Etc::SourceList=/dev/null -o APT::Get::List-Cleanup=false"
    host.write("/etc/apt/sources.list.d/nfq-agent.sources", sources)
    until(
        lambda: host.run("apt-get", *only.split(), "update", "--error-on=any", check=False).returncode == 0,
        "the repository is read",
    )

    def version_now() -> tuple[str, str]:
        shown = host.run("dpkg-query", "--show", "--showformat=${Version}", "nfq-agent").stdout
        return shown, host.run("nfq-agent", "--version").stdout.split()[-1]

    host.run("apt-get", "install", "-y", "nfq-agent", timeout=300)
    assert version_now() == (f"{version}~{release.id}", version)
    until(lambda: host.show("nfq-agent", "ActiveState") == "active", "nfq-agent is active")

    work = out.parent
    at_next_version(work / "clone")
    raised(built.deb, work, _NEXT)
    done = release_of(work / "clone", key, out, f"v{_NEXT}", str(work / "packages"))
    assert done.returncode == 0, done.stderr
    assert (out / _NEXT / "RELEASE-NOTES.md").read_text().startswith(f"# nfq-agent {_NEXT}\n")
    pid = main_pid(host)
    host.run("apt-get", *only.split(), "update", "--error-on=any")
    with steady(host) as connection:
        host.run("apt-get", "install", "-y", "--only-upgrade", "nfq-agent", timeout=300)
    assert connection.rounds > 20
    assert version_now() == (f"{_NEXT}~{release.id}", _NEXT)
    assert main_pid(host) not in (0, pid)
    exchange(host)

    # Back to the version before, which has a suite of its own.
    host.write("/etc/apt/sources.list.d/nfq-agent.sources", sources.replace(release.name, f"{release.name}-{version}"))
    host.run("apt-get", *only.split(), "update", "--error-on=any")
    host.run("apt-get", "install", "-y", "--allow-downgrades", f"nfq-agent={version}~{release.id}", timeout=300)
    assert version_now() == (f"{version}~{release.id}", version)
    exchange(host)

    # What the key did not sign is not read.
    listed = out / f"apt/dists/{release.name}-{version}/InRelease"
    listed.write_text(listed.read_text().replace("Label: nfq-agent", "Label: another"))
    os.utime(listed, (4e9, 4e9))
    refused = host.run("apt-get", *only.split(), "update", "--error-on=any", check=False)
    assert refused.returncode != 0
    host.run("apt-get", "purge", "-y", "nfq-agent", timeout=120)
    assert ours(host) == []
