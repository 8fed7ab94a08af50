"""The configuration's file: TOML, with the drop-ins beside it, read and checked into one `Config`."""

from __future__ import annotations

import copy
import os
import stat
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from nfq_agent.config.lines import Place, lines
from nfq_agent.config.lookups import HostLookups
from nfq_agent.config.models import Config, ConfigError
from nfq_agent.config.problems import cross_faults
from nfq_agent.config.source import Source
from nfq_agent.config.wording import model_faults
from nfq_agent.elements import ElementError, look_in

DEFAULT_PATH: Final = Path("/etc/nfq-agent/nfq-agent.toml")

# What the agent does with no configuration file at all: shared with the packaged default file.
BASELINE: Final[dict[str, Any]] = {
    "queue": {"main": {"num": 100}},
    "rules": {"app": {"queue": "main", "tcp_ports": [11000]}},
}
# And with TARGET_ADDR in the environment: the proxy, on its usual listeners. What leads to it is the user's own affair.
PROXY_BASELINE: Final[dict[str, Any]] = {"proxy": {"tcp": {}}}


def load(path: Path | None = None, adjust: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None) -> Config:
    """Read the file and its drop-ins, check all of it, and return it. Raises ConfigError with every fault found.

    Drop-ins are merged over the file in the order of their names: `conf.d/*.toml` beside it, which every file in that folder
    shares, then `NAME.d/*.toml` for the file `NAME.toml` alone. Without a path, the default file is read if it exists, else
    the baseline holds: that of the proxy if TARGET_ADDR is in the environment. `adjust` gets what was read and
    returns what the command line wants otherwise; that is merged last.
    """
    if path is None:
        path = DEFAULT_PATH
        files = [path] if path.exists() else []
    else:
        files = [path]
    merged: dict[str, Any] = {}
    source = Source(path)
    faults: list[str] = []
    try:
        for folder in (path.parent / "conf.d", path.with_suffix(".d")):
            files += _drop_ins(folder)
    except ConfigError as error:
        faults += error.faults
    for file in files:
        try:
            _merge(merged, _read(file, source), file, source.origins)
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError(faults)
    try:
        look_in(path.parent / "elements")
    except ElementError as error:
        raise ConfigError([f"{error.name}: {error.reason}"]) from error
    if not files:
        merged = copy.deepcopy(PROXY_BASELINE if os.environ.get("TARGET_ADDR") else BASELINE)
    if adjust is not None:
        _merge(merged, adjust(merged), Path("command line"), source.origins)
    return _check(merged, source, HostLookups(path.parent))


def _drop_ins(folder: Path) -> list[Path]:
    try:
        mode = folder.stat().st_mode
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError([f"{folder}: cannot be read: {error.strerror}; allowed: a folder of *.toml files"]) from error
    if mode & stat.S_IWOTH:
        raise ConfigError([f"{folder}: anyone may write to this directory; allowed: chmod o-w {folder}"])
    try:
        return sorted(child for child in folder.iterdir() if child.suffix == ".toml")
    except OSError as error:
        raise ConfigError([f"{folder}: cannot be read: {error.strerror}; allowed: a folder of *.toml files"]) from error


def _read(path: Path, source: Source) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}; allowed: a readable TOML file"]) from error
    try:
        text = data.decode()
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: not TOML: {error}; allowed: TOML 1.0"]) from error
    source.lines[path] = lines(text)
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


def _check(merged: dict[str, Any], source: Source, lookups: HostLookups) -> Config:
    try:
        config = Config.model_validate(merged).with_lookups(lookups)
    except ValidationError as error:
        raise ConfigError(list(model_faults(source, error))) from error
    faults = list(cross_faults(config, source))
    if faults:
        raise ConfigError(faults)
    return config
