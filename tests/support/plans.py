"""What an agent runs that is going to be killed, in which order what dies, and the code that it is upgraded to."""

from __future__ import annotations

import compileall
import py_compile
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from steps import Target

FEATURES: Final = ("queue", "proxy", "tproxy", "tap", "inline", "clsact", "all")
BACKENDS: Final = ("legacy", "owned")
SCENARIOS: Final = ("start", "serve", "reload", "restart", "stop", "repair", "upgrade")
SHORTAGES: Final = ("none", "lock", "disk", "memory", "group", "descriptors")
WAYS: Final = ("KILL", "STOP", "TERM")

_QUEUE: Final = """
[queue.main]
num = 100
{queue}
[rules.app]
queue = "main"
hooks = ["output"]
udp_ports = [{ports}]
"""
_MORE: Final = """
[queue.more]
num = 101
[rules.more]
queue = "more"
hooks = ["input"]
udp_ports = [11003]
"""
_PROXY: Final = """
[proxy.tcp]
listen = ["0.0.0.0:{port}", "[::]:{port}"]
drain = "100ms"
{capture}
[rules.redirect]
proxy = "tcp"
hooks = ["{hook}"]
tcp_ports = [{ports}]
"""
_TAP: Final = """
[tap.wire]
interfaces = ["{interfaces}"]
"""
_INLINE: Final = """
[inline.wire]
interfaces = ["{interfaces}"]
udp_ports = [11000]
attach = "{attach}"
"""


def configuration(feature: str, backend: str, changed: bool, drift_check: str = "5s") -> str:
    """The file's text; `changed` after a reload."""
    parts = [f'[agent]\nbackend = "{backend}"\ndrift_check = "{drift_check}"\n']
    if feature in ("queue", "all"):
        parts.append(_QUEUE.format(queue="max_len = 8192" if changed else "", ports="11000, 11002" if changed else "11000"))
        parts += [_MORE] if changed else []
    if feature in ("proxy", "tproxy", "all"):
        capture, hook = ('capture = "tproxy"', "prerouting") if feature == "tproxy" and not changed else ("", "output")
        port = 15003 if changed and feature == "proxy" else 15002
        parts.append(_PROXY.format(port=port, capture=capture, hook=hook, ports="8080, 8081" if changed else "8080"))
    if feature in ("tap", "all"):
        parts.append(_TAP.format(interfaces="veth*" if changed else "lo"))
    if feature in ("inline", "clsact"):
        parts.append(_INLINE.format(interfaces="veth*" if changed else "veth0", attach="tcx" if feature == "inline" else feature))
    return "".join(parts)


@dataclass(frozen=True, slots=True)
class Plan:
    """One or more lives. targets: what dies, one after the other: in the same agent while it lives, else in the next one."""

    feature: str
    backend: str
    scenario: str
    targets: tuple[Target, ...] = ()
    shortage: str = "none"
    amount: int = 0

    def __str__(self) -> str:
        targets = ",".join(f"{each.kind}:{each.step}:{each.how}" for each in self.targets)
        return "/".join((self.feature, self.backend, self.scenario, targets, self.shortage, str(self.amount)))

    @classmethod
    def parse(cls, text: str) -> Plan:
        """What `str` of one was. Raises ValueError."""
        feature, backend, scenario, targets, shortage, amount = text.split("/")
        split = [each.split(":") for each in targets.split(",") if each]
        found = tuple(Target(kind, int(step), how) for kind, step, how in split)
        return cls(feature, backend, scenario, found, shortage, int(amount))


@dataclass(slots=True)
class Outcome:
    """deaths: by scenario, kind and way. counts: of the calls in the scenario. problems: lines."""

    deaths: Counter[tuple[str, str, str]]
    counts: Counter[str]
    problems: list[str]
    log: str = ""
    seconds: float = 0.0


class Code:
    """A link to one of two copies of the code: to change it is an upgrade."""

    def __init__(self, folder: Path, source: Path) -> None:
        """folder: where they are made. source: of the import package."""
        for name in ("first", "second"):
            shutil.copytree(source, folder / name / source.name, ignore=shutil.ignore_patterns("*.c", "*.pyx", "__pycache__"))
            # A start reads it again and again: compiling it costs more than a start.
            compileall.compile_dir(folder / name, quiet=1, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
        self._link = folder / "code"
        self._folder = folder
        self._now = "second"
        self.change()

    @property
    def path(self) -> Path:
        """What PYTHONPATH names."""
        return self._link

    def change(self) -> None:
        """Put the other one in its place, in one step."""
        self._now = "first" if self._now == "second" else "second"
        new = self._folder / "code.new"
        new.symlink_to(self._now)
        new.replace(self._link)
