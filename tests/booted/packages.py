"""The packages under test, built from the working tree in a root of the release that they are for, without a network."""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from booted.container import Layer
from booted.roots import Release, build_root, made_once

TOP = Path(__file__).resolve().parent.parent.parent
_PARTS = ("agent", "docs/*.md", "docs/*.json", "examples", "packaging", "systemd", "tests/configs", "pyproject.toml", "*.md")


@dataclass(frozen=True, slots=True)
class Packages:
    """What `packaging/build` made for a release."""

    release: Release
    folder: Path

    @property
    def deb(self) -> Path:
        """The .deb."""
        (found,) = self.folder.glob("*.deb")
        return found

    @property
    def rpm(self) -> Path:
        """The .rpm."""
        (found,) = self.folder.glob("*.rpm")
        return found


@dataclass(frozen=True, slots=True)
class Installed:
    """A host on which the package has been installed with apt, while it ran."""

    lower: tuple[Path, ...]
    output: str
    state: str
    enabled: str
    rules: str


def packages(release: Release, again: Packages | None = None, top: Path = TOP) -> Packages:
    """Both packages of a release, built once for the same sources. again: those to build a second time, from what they were.
    top: the working tree."""
    wanted = hashlib.sha256(f"{build_root(release).name}\n".encode())
    if again is None:
        sources = {str(file.relative_to(top)): file for file in _sources(top)}
        date = git("log", "-1", "--format=%ct", top=top).strip()
    else:
        # The working tree may have changed.
        kept = again.folder / "source"
        sources = {str(file.relative_to(kept)): file for file in sorted(kept.rglob("*")) if file.is_file()}
        date = (again.folder / "date").read_text()
        wanted.update(b"again\n")
    for name, file in sources.items():
        wanted.update(f"{name} {file.stat().st_mode & 0o111}\n".encode() + file.read_bytes())

    def make(folder: Path) -> None:
        downloaded = wheels(release, "", "-build", "-rpm", top=top)
        for name, file in sources.items():
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
        (folder / "date").write_text(date)
        with Layer(build_root(release)) as layer:
            shutil.copytree(folder / "source", layer.root / "srv/nfq-agent")
            offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/srv/wheels", "SOURCE_DATE_EPOCH": date}
            print(layer.run("/srv/nfq-agent/packaging/build", binds=[f"--bind-ro={downloaded}:/srv/wheels"], environment=offline))
            for made in (layer.root / "srv/nfq-agent/dist").iterdir():
                shutil.copy(made, folder)

    return Packages(release, made_once(f"{release.name}-packages-{wanted.hexdigest()[:12]}", make))


def _sources(top: Path) -> list[Path]:
    """The files that git knows or would take, of the parts that a package is built from."""
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *_PARTS, top=top)
    return sorted(path for name in set(listed.split("\0")) if name and (path := top / name).is_file())


def git(*words: str, top: Path = TOP) -> str:
    return subprocess.run(["git", *words], cwd=top, check=True, capture_output=True, text=True).stdout


def wheels(release: Release, *parts: str, top: Path = TOP) -> Path:
    """What pip would download, fetched by this machine's pip for the Python of the release. parts: of the names of the locks."""
    locks = [top / "packaging" / f"requirements{part}.txt" for part in parts]
    wanted = hashlib.sha256(b"".join(lock.read_bytes() for lock in locks)).hexdigest()[:12]
    machine = platform.machine()
    platforms = (f"manylinux2014_{machine}", f"manylinux_2_28_{machine}", f"manylinux1_{machine}", "any")

    def make(folder: Path) -> None:
        for lock in locks:
            subprocess.run(
                [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--retries=10", "--timeout=60",
                 "download", "--no-deps", "--require-hashes", "--requirement", str(lock), "--dest", str(folder),
                 "--implementation=cp", f"--python-version={release.python}", *(f"--platform={name}" for name in platforms)],
                check=True,
            )  # fmt: skip

    return made_once(f"{release.name}-wheels-{wanted}", make)
