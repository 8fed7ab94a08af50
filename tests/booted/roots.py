"""Roots of Debian hosts, made once and kept: a minimal host, one that builds packages, one with other programs' packages."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from booted.nspawn import checked, control_group, nspawn, setenv

# What a test's host has beside a minimal Debian, and what the package depends on: that is downloaded only, so that
# installing it shows whether its dependencies are right.
_HOST = ("iproute2", "systemd-sysv", "ca-certificates")


_DEPENDENCIES = ("iptables", "kmod", "libnetfilter-queue1", "python3")


_BUILD = (
    "build-essential", "clang", "debhelper", "dh-python", "libnetfilter-queue-dev", "lintian", "man-db", "pkgconf",
    "python3-dev", "python3-venv", "rpm", "rpmlint",
)  # fmt: skip


# Seconds that a root may take on a loaded machine.
_LONG = 1800
_APT = ("apt-get", "-qq", "-y", "-o", "Acquire::Retries=5")


@dataclass(frozen=True, slots=True)
class Release:
    """A Debian release. id: as in its os-release."""

    name: str
    id: str
    python: str


RELEASES = (Release("bookworm", "debian12", "3.11"), Release("trixie", "debian13", "3.13"))


def cache() -> Path:
    """The folder of all that is made once."""
    folder = Path(os.environ.get("NFQ_AGENT_TEST_CACHE", "/var/cache/nfq-agent-tests"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, filled by `make` if it is not there. Another run that needs it waits."""
    folder = cache() / name
    with (cache() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            partial = cache() / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                make(partial)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            partial.rename(folder)
    os.utime(folder)
    return folder


def again(make: Callable[[], object], folder: Path) -> None:
    """Fill a folder; once more from the beginning if that fails: what is downloaded may not come for a moment."""
    try:
        make()
    except AssertionError as error:
        print(f"once more: {error}")
        shutil.rmtree(folder)
        folder.mkdir()
        make()


def base_root(release: Release) -> Path:
    """A minimal host of the release, with the packages that nfq-agent depends on waiting in apt's cache."""
    wanted = _hash("base 1", *_HOST, *_DEPENDENCIES)

    def make(root: Path) -> None:
        command = ["debootstrap", "--variant=minbase", f"--include={','.join(_HOST)}", release.name, str(root), _mirror()]
        again(lambda: checked(command, timeout=_LONG), root)
        with _apt(root):
            _apt_get(root, "update")
            _apt_get(root, "install", "--download-only", *_DEPENDENCIES)

    return made_once(f"{release.name}-base-{wanted}", make)


def build_root(release: Release) -> Path:
    """A host of the release with what building and checking packages takes."""
    base = base_root(release)
    wanted = _hash("build 1", base.name, *_BUILD)

    def make(root: Path) -> None:
        checked(["cp", "-a", "--reflink=auto", f"{base}/.", str(root)])
        with _apt(root):
            _apt_get(root, "install", "--no-install-recommends", *_BUILD)
            _apt_get(root, "clean")

    return made_once(f"{release.name}-build-{wanted}", make)


def neighbours_root(release: Release, *neighbours: str) -> Path:
    """A host of the release with packages of programs that write rules of their own. None of their services is enabled."""
    base = base_root(release)
    wanted = _hash("neighbours 1", base.name, *neighbours)

    def make(root: Path) -> None:
        checked(["cp", "-a", "--reflink=auto", f"{base}/.", str(root)])
        preset = root / "etc/systemd/system-preset/00-none.preset"
        preset.parent.mkdir(parents=True, exist_ok=True)
        preset.write_text("disable *\n")
        with _apt(root):
            _apt_get(root, "install", "--no-install-recommends", *neighbours)
            _apt_get(root, "install", "--download-only", *_DEPENDENCIES)
        preset.unlink()

    return made_once(f"{release.name}-neighbours-{wanted}", make)


def unpacked(release: Release, *packages: str) -> Path:
    """A folder with these packages of the release, each unpacked into a folder of its name and not installed."""
    base = base_root(release)
    wanted = _hash("unpacked 1", base.name, *packages)

    def make(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=cache()) as copy:
            root = Path(copy) / "root"
            checked(["cp", "-a", "--reflink=auto", f"{base}/.", str(root)])
            with _apt(root):
                _apt_get(root, "install", "--download-only", *packages)
            for package in packages:
                (found,) = root.glob(f"var/cache/apt/archives/{package}_*.deb")
                checked(["dpkg-deb", "--extract", str(found), str(folder / package)])

    return made_once(f"{release.name}-unpacked-{wanted}", make)


def _hash(*words: str) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:12]


def _mirror() -> str:
    """Where this machine gets Debian from, else Debian's own address."""
    targets = checked(["apt-get", "indextargets", "--format", "$(LABEL)|$(TARGET_OF)|$(REPO_URI)", "Created-By: Packages"])
    for line in targets.splitlines():
        label, kind, address = line.split("|")
        if (label, kind) == ("Debian", "deb"):
            return address
    return "http://deb.debian.org/debian"


@contextlib.contextmanager
def _apt(root: Path) -> Iterator[None]:
    """This machine's way to the mirror (proxies and the like), lent to a root while it is made."""
    settings = root / "etc/apt/apt.conf.d/90lent"
    lines = checked(["apt-config", "dump"]).splitlines()
    settings.write_text("".join(f"{line}\n" for line in lines if line.startswith("Acquire::")))
    resolver = root / "etc/resolv.conf"
    resolver.unlink(missing_ok=True)
    shutil.copy("/etc/resolv.conf", resolver)
    try:
        yield
    finally:
        settings.unlink()
        resolver.write_text("")


def _apt_get(root: Path, *words: str) -> None:
    with control_group() as enter:
        checked([*enter, *nspawn(root), "--pipe", *setenv(), *_APT, *words], timeout=_LONG)
