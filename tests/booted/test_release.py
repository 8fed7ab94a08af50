"""What packaging/release makes: hosts install from it over HTTP, upgrade, go back to the version before, and purge."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from booted.container import Container, Layer
from booted.nspawn import checked, until
from booted.packages import TOP, Packages, packages
from booted.peers import exchange, main_pid, ours, steady
from booted.repository import release_of, served
from booted.roots import Release, base_root

_NEXT = "9.0.0"
# The commit of version 0.1.0.
_BEFORE = "2320488"


def at_next_version(clone: Path) -> None:
    """Commit and tag the next version in a clone."""
    for name, before, after in (
        ("pyproject.toml", r'^version = ".*"', f'version = "{_NEXT}"'),
        ("packaging/debian/changelog", r"\A.*\(.*?\)", f"nfq-agent ({_NEXT})"),
        ("packaging/rpm/changelog.yaml", r"\A- semver: .*", f"- semver: {_NEXT}"),
        ("CHANGELOG.md", r"^(?=## )", f"## {_NEXT} - 2030-01-01\n\n- Next.\n\n"),
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


def before(release: Release, folder: Path) -> Path:
    """The .deb of the release before, 0.1.0, built from its commit."""
    checked(["git", "clone", "--quiet", "--shared", "--no-checkout", str(TOP), str(folder)])
    try:
        checked(["git", "-C", str(folder), "checkout", "--quiet", _BEFORE])
    except AssertionError:
        pytest.skip("the history of this checkout does not reach version 0.1.0 (git fetch --unshallow)")
    return packages(release, top=folder).deb


def test_a_host_follows_the_repository(release: Release, built: Packages, key: str, tmp_path: Path) -> None:
    (version,) = re.findall(r'^version = "(.*)"$', (TOP / "pyproject.toml").read_text(), re.MULTILINE)
    # The working tree's repository may get commits meanwhile.
    out, clone = tmp_path / "out", tmp_path / "clone"
    checked(["git", "clone", "--quiet", "--shared", str(TOP), str(clone)])
    # What the release before left: its package in the pool.
    pool = out / "apt/pool/main/n/nfq-agent"
    pool.mkdir(parents=True)
    shutil.copy(before(release, tmp_path / "before"), pool)
    done = release_of(clone, key, out, "--version", version, str(built.folder))
    assert done.returncode == 0, done.stderr
    assert checked(["git", "-C", str(clone), "rev-parse", "HEAD"]).strip() in done.stdout
    checked(["sha256sum", "--check", "--strict", f"{version}/SHA256SUMS"], cwd=out)
    checked(["gpg", "--batch", "--verify", str(out / version / "SHA256SUMS.asc"), str(out / version / "SHA256SUMS")])
    assert '"pydantic' in (out / version / f"nfq-agent-{version}.cdx.json").read_text()
    again = tmp_path / "again"
    shutil.copytree(out / "apt/pool", again / "apt/pool")
    (again / f"apt/pool/main/n/nfq-agent/{built.deb.name}").unlink()
    assert release_of(clone, key, again, "--version", version, str(built.folder)).returncode == 0
    checked(["diff", "--recursive", str(out), str(again)])
    # Another version than that of the commit is refused.
    refused = release_of(clone, key, tmp_path / "other", "--version", _NEXT, str(built.folder))
    assert (refused.returncode, refused.stderr) == (2, f"release: pyproject.toml is at version {version}, not at {_NEXT}\n")

    with Layer(base_root(release)) as layer, Container(layer) as host, served(host, out):
        follow(host, release, version, built, key, out)


def follow(host: Container, release: Release, version: str, built: Packages, key: str, out: Path) -> None:
    keyring = host.root / "usr/share/keyrings/nfq-agent-archive-keyring.gpg"
    keyring.write_bytes((out / "nfq-agent-archive-keyring.gpg").read_bytes())
    sources = (out / f"nfq-agent-{release.name}.sources").read_text()
    only = "-o Dir::Etc::SourceList=/dev/null -o APT::Get::List-Cleanup=false"

    def from_suite(suffix: str = "") -> None:
        """Read the suite of the release, or of one version of it."""
        text = sources.replace(release.name, f"{release.name}{suffix}")
        host.write("/etc/apt/sources.list.d/nfq-agent.sources", text)
        update = ["apt-get", *only.split(), "update", "--error-on=any"]
        until(lambda: host.run(*update, check=False).returncode == 0, "the repository is read")

    def at(version: str) -> bool:
        """Whether package and agent are at a version."""
        shown = host.run("dpkg-query", "--show", "--showformat=${Version}", "nfq-agent").stdout
        # 0.1.0 does not say its version.
        said = f"nfq-agent {version}\n" if version == "0.1.0" else host.run("nfq-agent", "--version").stdout
        return (shown, said) == (f"{version}~{release.id}", f"nfq-agent {version}\n")

    def install(*words: str) -> None:
        """Install with a connection in use."""
        with steady(host) as connection:
            host.run("apt-get", "install", "-y", *words, timeout=900)
        assert connection.rounds > 20
        until(lambda: host.show("nfq-agent", "ActiveState") == "active", "nfq-agent is active")

    from_suite("-0.1.0")
    # Without a connection in use: the host gets its Python with the package.
    host.run("apt-get", "install", "-y", "nfq-agent", timeout=900)
    until(lambda: host.show("nfq-agent", "ActiveState") == "active", "nfq-agent is active")
    assert at("0.1.0")
    # An edited configuration stays.
    host.shell("echo '# mine' >>/etc/nfq-agent/nfq-agent.toml")
    keep = "-o Dpkg::Options::=--force-confold"
    from_suite()
    install(*keep.split(), "--only-upgrade", "nfq-agent")
    assert at(version)
    assert host.shell("tail -n 1 /etc/nfq-agent/nfq-agent.toml") == "# mine\n"
    exchange(host)

    work = out.parent
    at_next_version(work / "clone")
    raised(built.deb, work, _NEXT)
    done = release_of(work / "clone", key, out, f"v{_NEXT}", str(work / "packages"))
    assert done.returncode == 0, done.stderr
    assert (out / _NEXT / "RELEASE-NOTES.md").read_text().startswith(f"# nfq-agent {_NEXT}\n")
    pid = main_pid(host)
    host.run("apt-get", *only.split(), "update", "--error-on=any")
    install("--only-upgrade", "nfq-agent")
    assert at(_NEXT)
    assert main_pid(host) not in (0, pid)
    exchange(host)

    # Back to the versions before, each of which has a suite of its own.
    for older in (version, "0.1.0"):
        from_suite(f"-{older}")
        install(*keep.split(), "--allow-downgrades", f"nfq-agent={older}~{release.id}")
        assert at(older)
        exchange(host)

    # What the key did not sign is not read.
    listed = out / f"apt/dists/{release.name}-0.1.0/InRelease"
    listed.write_text(listed.read_text().replace("Label: nfq-agent", "Label: another"))
    os.utime(listed, (4e9, 4e9))
    refused = host.run("apt-get", *only.split(), "update", "--error-on=any", check=False)
    assert refused.returncode != 0
    host.run("apt-get", "purge", "-y", "nfq-agent")
    assert ours(host) == []
