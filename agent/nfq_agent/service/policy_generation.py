"""Generations of policies: which one `offload` marks flows with, so that a changed policy applies to the marked ones again.

The state is a small file in the agent's folder in /run; like the connections, it does not outlive a boot.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from nfq_agent.config.models import Config, ElementSpec, QueueConfig

_LONGEST: Final = 1 << 20
Generations = Mapping[str, tuple[str, int]]


def read(path: Path) -> dict[str, tuple[str, int]]:
    """The latest digest and generation of the policy of each [element.NAME] that offloads. Empty if there is no such file."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            data = json.loads(file.read(_LONGEST))
        return {str(name): (str(digest), int(number)) for name, (digest, number) in data.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        # `_write` leaves no half-written file; before the first one after a boot no connection carries a mark of ours.
        return {}


def _write(path: Path, text: str) -> None:
    """Replace the file as a whole. The folder belongs to the agent's user and this may be root: no link is followed."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    with contextlib.suppress(FileNotFoundError):
        new.unlink()
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644), "w") as file:
        file.write(text)
    os.replace(new, path)


def foreseen(config: Config, path: Path) -> Config:
    """The configuration as `advance` would make it. Writes nothing."""
    return raised(config, read(path))[0]


def advance(config: Config, path: Path) -> Config:
    """The configuration with a new generation for each policy that differs from the last time, which is kept in `path`.

    To be called before the configuration is put into force: a generation of a failed reload is never used for another
    policy. Raises OSError.
    """
    before = read(path)
    config, now = raised(config, before)
    if now and before | now != before:
        _write(path, json.dumps(before | now))
    return config


def raised(config: Config, before: Generations) -> tuple[Config, dict[str, tuple[str, int]]]:
    """The configuration with the generation of each element that offloads, and what is to be kept of that.

    Raises ElementError if an element cannot be loaded; a checked configuration raises nothing.
    """
    now: dict[str, tuple[str, int]] = {}
    elements = {name: dict(table) for name, table in config.element.items()}
    for name, digest in _digests(config).items():
        known = before.get(name)
        number = 0 if known is None else known[1] + (known[0] != digest)
        now[name] = digest, number
        table = elements.setdefault(name, {})
        table["generation"] = table.get("generation", 0) + number
    return (config.model_copy({"element": elements}) if now else config), now


def _digests(config: Config) -> dict[str, str]:
    """For each element that offloads, a digest of every policy that it keeps verdicts of."""
    texts: dict[str, list[str]] = {}
    for name, queue in sorted(config.queue.items()):
        specs = config.packet_elements(queue)
        for spec in specs:
            if spec.cls.kept_of(spec.options) is not None:
                texts.setdefault(spec.name, []).append(_text(name, queue, specs))
    if not texts:
        return {}
    import hashlib

    return {name: hashlib.sha256("\n".join(lines).encode()).hexdigest() for name, lines in texts.items()}


def _text(name: str, queue: QueueConfig, specs: list[ElementSpec]) -> str:
    elements = [(spec.name, f"{spec.cls.__module__}:{spec.cls.__qualname__}", repr(spec.options)) for spec in specs]
    return repr((name, queue.mode, queue.default, elements))
