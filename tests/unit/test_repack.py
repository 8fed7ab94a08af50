"""A repacked .deb: dpkg unpacks the same files from it."""

from __future__ import annotations

import lzma
import os
import subprocess
from pathlib import Path

import pytest
from packaged import program

repack = program("repack")


def package(folder: Path) -> Path:
    """A .deb with a folder, texts, a link and a program."""
    root = folder / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN/control").write_text(
        "Package: t\nVersion: 1\nArchitecture: amd64\nMaintainer: m <m@example.org>\nDescription: t\n"
    )
    (root / "usr/share/t").mkdir(parents=True)
    (root / "usr/share/t/b.txt").write_text("b\n" * 1000)
    (root / "usr/share/t/a.so").write_bytes(Path("/bin/true").read_bytes())
    (root / "usr/share/t/a.txt").write_text("a\n")
    (root / "usr/share/t/z").symlink_to("a.txt")
    os.link(root / "usr/share/t/b.txt", root / "usr/share/t/a")
    file = folder / "t_1_amd64.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", str(root), str(file)], check=True, capture_output=True)
    return file


def files(file: Path, into: Path) -> dict[str, bytes]:
    subprocess.run(["dpkg-deb", "--raw-extract", str(file), str(into)], check=True)
    return {str(each.relative_to(into)): each.read_bytes() for each in into.rglob("*") if each.is_file()}


def test_dpkg_unpacks_the_same(tmp_path: Path) -> None:
    old = package(tmp_path)
    new = tmp_path / "new_1_amd64.deb"
    new.write_bytes(repack.repack(old.read_bytes(), "amd64"))
    assert files(new, tmp_path / "3") == files(old, tmp_path / "4")
    assert repack.entries(new.read_bytes())[:2] == repack.entries(old.read_bytes())[:2]


def test_it_is_the_same_each_time_and_machine_code_is_smaller(tmp_path: Path) -> None:
    old = package(tmp_path).read_bytes()
    once = repack.repack(old, "amd64")
    assert repack.repack(old, "amd64") == once
    code = Path("/usr/lib/x86_64-linux-gnu/libc.so.6").read_bytes()
    assert len(repack.compress(code, "amd64")) < len(repack.compress(code, "s390x"))
    assert lzma.decompress(repack.compress(code, "amd64")) == code


def test_what_is_no_package_is_refused() -> None:
    with pytest.raises(ValueError, match="archive"):
        repack.entries(b"no")
