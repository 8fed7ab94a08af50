"""`bugreport`: one text file with what a maintainer needs. Addresses and names are replaced on request."""

from __future__ import annotations

import ipaddress
import json
import os
import platform
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from nfq_agent.cli import loading, running, show
from nfq_agent.cli.doctor import examine
from nfq_agent.cli.flags import Flags
from nfq_agent.cli.show import wrapped
from nfq_agent.config.file import DEFAULT_PATH
from nfq_agent.config.models import ConfigError
from nfq_agent.service.control import ControlError
from nfq_agent.version import version

_ADDRESS: Final = re.compile(r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*)(?![\w:])")
_DOMAIN: Final = re.compile(r"(?<![\w./-])(?:\*\.)?(?:[A-Za-z0-9_-]+\.)+[A-Za-z]{2,}(?![\w/-])")
# Words that look like a domain, but are a file, a unit or a key of the configuration.
_KNOWN: Final = re.compile(
    r"\.(?:toml|py|pyx|txt|service|slice|socket|conf|so|d|md|sock|lock|log|pcapng)$"
    r"|^(?:queue|rules|element|proxy|agent|tap|inline|net|kernel)\."
)
_COMMANDS: Final = (
    "iptables-legacy-save", "ip6tables-legacy-save", "nft list ruleset", "journalctl -u nfq-agent* -n 300 -o short",
)  # fmt: skip
_MAC: Final = re.compile(r"(?<![\w:])(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}(?![\w:])")


def bugreport(flags: Flags, output: Path | None, anonymize: bool) -> int:
    """Write the file, readable by its owner alone."""
    path = output or Path(f"nfq-agent-bugreport-{time.strftime('%Y%m%d-%H%M%S')}.txt")
    text = "\n".join(f"===== {title} =====\n{_collected(collect)}\n" for title, collect in _sections(flags))
    if anonymize:
        text = anonymous(text, [socket.gethostname(), *_users()])
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        show.error(f"nfq-agent: {path}: {error.strerror}")
        return 1
    kept = "addresses and names are replaced" if anonymize else "it holds addresses and names: --anonymize replaces them"
    wrapped(f"wrote {path}; read it before you send it ({kept})")
    return 0


def _sections(flags: Flags) -> Iterator[tuple[str, Callable[[], str]]]:
    config = flags.config or DEFAULT_PATH
    yield "nfq-agent", lambda: f"{version()}, Python {platform.python_version()}, {platform.machine()}"
    yield "system", lambda: f"{platform.platform()}\n{_read(Path('/etc/os-release'))}"
    yield f"configuration {config}", lambda: _read(config)
    for folder in (config.parent / "conf.d", config.with_suffix(".d")):
        with suppress(OSError):
            for path in sorted(folder.glob("*.toml")):
                yield f"configuration {path}", lambda path=path: _read(path)  # type: ignore[misc]  # of this turn of the loop
    yield "check", lambda: f"valid; instance {loading.configuration(flags).agent.instance}"
    yield "status", lambda: json.dumps(running.status_object(loading.instance_of(flags), 5.0), indent=1, default=str)
    yield (
        "doctor",
        lambda: "\n".join(
            f"{each.level}: {each.subject}: {each.text} {each.advice}".rstrip() for each in examine(loading.configuration(flags))
        ),
    )
    for command in _COMMANDS:
        yield command, lambda command=command: _output(command)  # type: ignore[misc]  # of this turn of the loop


def _collected(collect: Callable[[], str]) -> str:
    try:
        return collect()
    except (OSError, subprocess.SubprocessError, ControlError) as error:
        return f"not available: {error}"
    except ConfigError as error:
        return "\n".join(error.faults)
    except Exception as error:  # a failure of one part must not prevent the report
        return f"failed: {type(error).__name__}: {error}"


def _read(path: Path) -> str:
    return path.read_text(errors="replace")


def _output(command: str) -> str:
    done = subprocess.run(command.split(), capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=20, errors="replace")
    return done.stdout + done.stderr


def _users() -> list[str]:
    """The names of this host's users who log in."""
    with suppress(OSError):
        entries = (line.split(":") for line in _read(Path("/etc/passwd")).splitlines())
        return [entry[0] for entry in entries if len(entry) > 2 and entry[2].isdecimal() and 1000 <= int(entry[2]) < 60000]
    return []


def anonymous(text: str, names: list[str]) -> str:
    """The text with each address, host name and one of `names` replaced, by the same word wherever it occurs."""
    words: dict[str, str] = {}

    def replace(kind: str, found: str) -> str:
        return words.setdefault(found.lower(), f"{kind}-{1 + sum(word.startswith(kind) for word in words.values())}")

    def address(match: re.Match[str]) -> str:
        try:
            value = ipaddress.ip_address(match[0])
        except ValueError:
            return match[0]
        return match[0] if value.is_loopback or value.is_unspecified else replace(f"ipv{value.version}", match[0])

    def domain(match: re.Match[str]) -> str:
        return match[0] if _KNOWN.search(match[0]) else replace("name", match[0])

    text = _MAC.sub(lambda match: replace("mac", match[0]), text)
    text = _ADDRESS.sub(address, text)
    text = _DOMAIN.sub(domain, text)
    for name in sorted((name for name in names if len(name) > 2), key=len, reverse=True):
        text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", lambda match: replace("host", match[0]), text)
    return text
