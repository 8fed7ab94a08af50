"""The configuration's file: TOML, with the drop-ins beside it, read and checked into one `Config`."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from nfq_agent.config.lines import Place
from nfq_agent.config.lookups import HostLookups, stamp
from nfq_agent.config.models import INSTANCE, Agent, Config, ConfigError
from nfq_agent.config.source import WITH_ELEMENTS, Source, tables_of
from nfq_agent.config.toml_text import read_toml
from nfq_agent.elements.access import open_folder, writable_by_others
from nfq_agent.elements.loading import CodeError, look_in
from nfq_agent.values import size_text

DEFAULT_PATH: Final = Path("/etc/nfq-agent/nfq-agent.toml")
# Bytes of a file: with 65,536 ports, one by one, it has 0.5 MB.
_LARGEST: Final = 8_000_000

# What the agent does with no configuration file at all: shared with the packaged default file.
BASELINE: Final[dict[str, Any]] = {
    "queue": {"main": {"num": 100}},
    "rules": {"app": {"queue": "main", "tcp_ports": [11000]}},
}
# And with TARGET_ADDR in the environment: the proxy, on its usual listeners. The rules that redirect to it are left to the user.
PROXY_BASELINE: Final[dict[str, Any]] = {"proxy": {"tcp": {}}}


# Checks what was read: the tables, where each key is from, and what looks names up. Raises ConfigError.
Check = Callable[[dict[str, Any], Source, HostLookups], Config]


def check(merged: dict[str, Any], source: Source, lookups: HostLookups) -> Config:
    """The `Check` of this process, which loads pydantic for it."""
    from nfq_agent.config.whole import checked

    return checked(merged, source, lookups)


def load(
    path: Path | None = None,
    adjust: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None,
    check: Check = check,
) -> Config:
    """Read the file and its drop-ins, check all of it, and return it. Raises ConfigError with every fault found.

    Drop-ins are merged over the file in the order of their names: `conf.d/*.toml` beside it, which every file in that folder
    shares, then `NAME.d/*.toml` for the file `NAME.toml` alone. Without a path, the default file is read if it exists, else
    the baseline applies: that of the proxy if TARGET_ADDR is in the environment. `adjust` gets what was read and
    returns the keys that the command line sets; they are merged last. `check` makes the configuration of it.
    """
    path, files, merged, source, faults = _gather(path)
    if faults:
        raise ConfigError(faults)
    _look_for_elements(path)
    lookups = HostLookups(path.parent)
    if not files:
        merged = copy.deepcopy(PROXY_BASELINE if os.environ.get("TARGET_ADDR") else BASELINE)
    if adjust is not None:
        _merge(merged, adjust(merged), Path("command line"), source.origins)
    config = check(merged, source, lookups)
    if config.agent.reload_on_change:
        config.watch(source.stamps, folders(path))
    return config


def load_table(table: dict[str, Any], path: Path | None = None, check: Check = check) -> Config:
    """The configuration that the previous agent served, from its `Config.table`. Raises ConfigError.

    path: of the main file, which is not read: names and elements are looked for beside it.
    """
    main = DEFAULT_PATH if path is None else path
    _look_for_elements(main)
    config = check(copy.deepcopy(table), Source(main), HostLookups(main.parent))
    return config.made_of(config.table, outdated=True)


def _look_for_elements(main: Path) -> None:
    try:
        look_in(main.parent / "elements")
    except CodeError as error:
        raise ConfigError([f"{main.parent / 'elements'}: {error}"]) from error


def _gather(path: Path | None) -> tuple[Path, list[Path], dict[str, Any], Source, list[str]]:
    """The main file, all files, their merged content, the place of each key, and why some of them could not be read."""
    main = DEFAULT_PATH if path is None else path
    files = [main] if path is not None or main.exists() else []
    merged: dict[str, Any] = {}
    source = Source(main)
    faults: list[str] = []
    try:
        for folder in folders(main):
            files += _drop_ins(folder)
    except ConfigError as error:
        faults += error.faults
    for file in files:
        try:
            _merge(merged, _read(file, source), file, source.origins)
        except ConfigError as error:
            faults += error.faults
    return main, files, merged, source, faults


def instance_in(path: Path | None = None) -> tuple[str, list[str]]:
    """The instance that the configuration names, whatever else is wrong with it, and why some of its files could not be read.

    No element is loaded. If no instance can be read, it is the default one.
    """
    main, _, merged, _, faults = _gather(path)
    agent = merged.get("agent")
    name = agent.get("instance") if isinstance(agent, dict) else None
    if name is None:
        name = (_instance_line(main) if faults else None) or Agent().instance
    if isinstance(name, str) and re.fullmatch(INSTANCE, name):
        return name, faults
    return Agent().instance, [*faults, f"{main}: agent.instance: {name!r} is not a valid name"]


def _instance_line(file: Path) -> str | None:
    """The instance by the text of its line, in a file that is not valid TOML."""
    try:
        found = re.search(r'(?m)^\s*instance\s*=\s*["\']([^"\']*)["\']', file.read_text(errors="replace"))
    except OSError:
        return None
    return found and found[1]


def without_elements(merged: Mapping[str, Any]) -> dict[str, Any]:
    """For `adjust`: the same configuration with no element in it, for verbs that must work although one cannot be loaded."""
    named = {kind: tables_of(merged, kind) for kind in WITH_ELEMENTS}
    return {kind: {name: {"elements": []} for name in tables} for kind, tables in named.items() if tables}


def folders(main: Path) -> tuple[Path, Path]:
    """Where drop-ins are: for every file beside `main`, and for that one."""
    return main.parent / "conf.d", main.with_suffix(".d")


def _drop_ins(folder: Path) -> list[Path]:
    try:
        folder.stat()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError([f"{folder}: cannot be read: {error.strerror}; allowed: a folder of *.toml files"]) from error
    if writable_by_others(folder, folder.parent):
        raise ConfigError([_open_to_others(folder, "folder")])
    try:
        return sorted(child for child in folder.iterdir() if child.suffix == ".toml")
    except OSError as error:
        raise ConfigError([f"{folder}: cannot be read: {error.strerror}; allowed: a folder of *.toml files"]) from error


def _open_to_others(path: Path, kind: str) -> str:
    return f"{path}: others may write to this {kind}; allowed: chown root {path}; chmod go-w {path}"


def _read(path: Path, source: Source) -> dict[str, Any]:
    # Before it is read: a change during the reading counts.
    source.stamps[path] = stamp(path)
    try:
        if path.is_dir():
            raise ConfigError([f"{path}: is a folder; allowed: a readable TOML file"])
        if writable_by_others(path, path.parent):
            raise ConfigError([_open_to_others(path, "file")])
        if (folder := open_folder(path, path.parent)) is not None:
            raise ConfigError([f"{path}: {_open_to_others(folder, 'folder')}"])
        # A pipe of the shell, `--config <(...)`, has no file behind it; a named one may have no writer.
        if path.resolve().is_fifo():
            raise ConfigError([f"{path}: is a named pipe; allowed: a readable TOML file"])
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}; allowed: a readable TOML file"]) from error
    if len(data) > _LARGEST:
        raise ConfigError(
            [f"{path}: has more than {size_text(_LARGEST)}; allowed: less, and long lists in files of their own (file:NAME)"]
        )
    source.texts[path], table = read_toml(path, data)
    return table


def _merge(
    into: dict[str, Any],
    new: Mapping[str, Any],
    file: Path,
    origins: dict[Place, Path],
    at: Place = (),
) -> None:
    for key, value in new.items():
        here = (*at, key)
        if isinstance(value, Mapping):
            if not isinstance(into.get(key), dict):
                into[key] = {}
                origins[here] = file
            _merge(into[key], value, file, origins, here)
        else:
            into[key] = value
            origins[here] = file
