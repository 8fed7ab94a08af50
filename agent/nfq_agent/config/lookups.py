"""Resolves the names in a configuration on this host: the ids of users and groups, and the lines of list files."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import stat
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import IO, Any, Final, TypeVar

from nfq_agent.config.geo import GeoFiles, Stamp, database
from nfq_agent.elements.access import open_folder
from nfq_agent.values import size_text

F = TypeVar("F", bound=IO[Any])
_RESOLV = Path("/etc/resolv.conf")
# Bytes of a list: more than a million networks, which take 600 MB of memory.
_LARGEST: Final = 20_000_000
# The version of a file that was not looked at yet; no file has it.
_NOT_SEEN: Stamp = (0, 0, 0)


class HostLookups:
    """The `Lookups` of this host.

    folder: where relative paths of list files begin. files: every list file that was read, with its stamp at that time.
    """

    def __init__(self, folder: Path = Path()) -> None:
        self._folder = folder
        self.files: dict[Path, Stamp | None] = {}
        self._written: dict[Path, Stamp | None] = {}
        self._folders: tuple[Path, ...] = ()
        self._seen: dict[Path, Stamp | None] = {}

    def uid(self, name: str) -> int:
        """The id of a user. Raises KeyError."""
        return pwd.getpwnam(_as_written(name)).pw_uid

    def gid(self, name: str) -> int:
        """The id of a group. Raises KeyError."""
        return grp.getgrnam(_as_written(name)).gr_gid

    def lines(self, file: str) -> list[tuple[int, str]]:
        """The entries of a list file with their line numbers: one a line, without comments (#). Raises ValueError."""
        path = self._folder / file
        self.files[path] = stamp(path)
        try:
            with _owned(path, open(path, encoding="utf-8-sig", opener=_at_once)) as lines:
                if os.fstat(lines.fileno()).st_size > _LARGEST:
                    what = f"has more than {size_text(_LARGEST)}"
                    raise ValueError(f"{path}: {what}; allowed: less, or the name of an ipset in set of [rules.NAME]")
                entries = ((number, line.partition("#")[0].strip()) for number, line in enumerate(lines, 1))
                return [(number, entry) for number, entry in entries if entry]
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not UTF-8; allowed: a text file with one entry a line") from None
        except OSError as error:
            raise ValueError(
                f"{path}: cannot be read: {error.strerror}; allowed: a readable file with one entry a line"
            ) from error

    def geography(self, files: tuple[str, ...]) -> GeoFiles:
        """The places in databases, the first that has an address first. Raises ValueError."""
        return GeoFiles([self._database(self._folder / file) for file in files])

    def _database(self, path: Path) -> tuple[Path, Stamp, Any]:
        version = self.files[path] = stamp(path)
        try:
            with _owned(path, open(path, "rb", opener=_at_once)) as file:
                return path, version or (0, 0, 0), database(path, file)
        except OSError as error:
            raise ValueError(
                f"{path}: cannot be read: {error.strerror}; allowed: a readable file in MaxMind's format (.mmdb)"
            ) from error

    def resolvers(self) -> tuple[str, ...]:
        """The name servers that this host asks (resolv.conf(5)); a change of the file is one of the configuration."""
        self.files[_RESOLV] = stamp(_RESOLV)
        try:
            lines = [line.split() for line in _RESOLV.read_text(errors="replace").splitlines()]
        except OSError:
            return ()
        # An address may have a zone behind it, which packets do not show.
        return tuple(words[1].partition("%")[0] for words in lines if len(words) > 1 and words[0] == "nameserver")

    def watch(self, files: Mapping[Path, Stamp | None], folders: Iterable[Path]) -> None:
        """Watch the configuration's own files as well. files: with their stamps from before they were read.
        folders: a file that appears there is a change."""
        self._written, self._folders = dict(files), tuple(folders)

    def changed(self) -> list[Path]:
        """The files that have changed since they were read, or since the last call that named them.

        A change counts once the file was the same at two calls: who writes it may not be at the end yet.
        """
        read = {**self._written, **self.files}
        listed = [child for folder in self._folders for child in _toml_files(folder)]
        now = {path: stamp(path) for path in (*read, *listed)}
        found = [
            path for path, version in now.items() if version != read.get(path) and version == self._seen.get(path, _NOT_SEEN)
        ]
        self._written |= {path: now[path] for path in found if path not in self.files}
        self.files |= {path: now[path] for path in found if path in self.files}
        self._seen = now
        return found


def _toml_files(folder: Path) -> list[Path]:
    try:
        return sorted(child for child in folder.iterdir() if child.suffix == ".toml")
    except OSError:
        return []


def _as_written(name: str) -> str:
    """A name that a file of users may have. Raises KeyError."""
    if not name.isprintable():
        raise KeyError(name)
    return name


def _at_once(name: str, flags: int) -> int:
    """Open a file; a pipe that nothing writes to is not waited for."""
    return os.open(name, flags | os.O_NONBLOCK)


@contextlib.contextmanager
def _owned(path: Path, file: F) -> Iterator[F]:
    """An open file that only root and the agent's user may change; closed at the end. Raises ValueError."""
    with file:
        state = os.fstat(file.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise ValueError(f"{path}: is not a regular file; allowed: one, or a link to one")
        if state.st_mode & (stat.S_IWOTH | stat.S_IWGRP) or state.st_uid not in (0, os.geteuid()):
            raise ValueError(f"{path}: others may write to this file; allowed: chown root {path}; chmod go-w {path}")
        if (folder := open_folder(path, path.parent)) is not None:
            raise ValueError(f"{path}: others may write to its folder; allowed: chown root {folder}; chmod go-w {folder}")
        yield file


def resolvers_of_host(lookups: HostLookups) -> list[IPv4Address | IPv6Address]:
    """Their addresses; a line that has none is left out, as the resolver library leaves it out."""
    found = []
    for text in lookups.resolvers():
        with contextlib.suppress(ValueError):
            found.append(ip_address(text))
    return found


def stamp(path: Path) -> Stamp | None:
    """The version of a file; None if it does not exist or cannot be seen."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_ino, state.st_size, state.st_mtime_ns
