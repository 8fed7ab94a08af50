"""`bugreport`: one text file with what a maintainer needs. Addresses and names are replaced on request."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

from nfq_agent.cli import loading, running, show
from nfq_agent.cli.anonymous import Replacements, names_in, sets_of, without_comments
from nfq_agent.cli.doctor import examine
from nfq_agent.cli.flags import Flags
from nfq_agent.cli.show import wrapped
from nfq_agent.config.file import DEFAULT_PATH, folders
from nfq_agent.config.models import ConfigError
from nfq_agent.service.control import ControlError
from nfq_agent.version import version

_COMMANDS: Final = (
    "iptables-legacy-save", "ip6tables-legacy-save", "nft list ruleset",
    "journalctl -u nfq-agent* -n 300 -o short --no-hostname",
)  # fmt: skip
_NOBODY: Final = 65534
_FIELDS: Final = "journalctl -u nfq-agent* -n 300 -o json"


def bugreport(flags: Flags, output: Path | None, anonymize: bool) -> int:
    """Write the file, readable by its owner alone."""
    path = output or Path(f"nfq-agent-bugreport-{time.strftime('%Y%m%d-%H%M%S')}.txt")
    files = {path: _collected(partial(_read, path)) for path in _files(flags)}
    found = {title: _collected(collect) for title, collect in _sections(flags, files, anonymize)}
    text = "\n".join(f"===== {title} =====\n{each}\n" for title, each in found.items())
    if anonymize:
        text = anonymous(text, dict(_known(files, found["status"], found["nft list ruleset"])), "\n".join(files.values()))
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        show.error(f"nfq-agent: {path}: {error.strerror}")
        return 1
    kept = "addresses and names are replaced" if anonymize else "it holds addresses and names: --anonymize replaces them"
    wrapped(f"wrote {path}; read it before you send it ({kept})")
    return 0


def _files(flags: Flags) -> list[Path]:
    """The files of the configuration."""
    main = flags.config or DEFAULT_PATH
    found = [main]
    for folder in folders(main):
        with suppress(OSError):
            found += sorted(folder.glob("*.toml"))
    return found


def _sections(flags: Flags, files: Mapping[Path, str], anonymize: bool) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "nfq-agent", lambda: f"{version()}, Python {platform.python_version()}, {platform.machine()}"
    yield "system", lambda: f"{platform.platform()}\n{_read(Path('/etc/os-release'))}"
    shown = without_comments if anonymize else str
    for path, text in files.items():
        yield f"configuration {path}", lambda text=text: shown(text)  # type: ignore[misc]  # of this turn of the loop
    yield "check", lambda: f"valid; instance {loading.configuration(flags).agent.instance}"
    yield (
        "status",
        lambda: json.dumps(running.status_object(loading.instance_of(flags), 5.0), indent=1, default=str, ensure_ascii=False),
    )
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


def _known(files: Mapping[Path, str], status: str, ruleset: str) -> Iterator[tuple[str, str]]:
    """Names without a form, with their kinds: of users and of this host, and those that the configuration and the log have.

    files: the texts of the configuration by their paths. status: of the running agent, as JSON. ruleset: as nft prints it.
    """
    for text in files.values():
        # A file with faults has its names, but no tables.
        with suppress(ValueError, RecursionError):
            yield from names_in(tomllib.loads(text))
    with suppress(OSError, subprocess.SubprocessError):
        for line in _output(_FIELDS).splitlines():
            with suppress(ValueError):
                fields = json.loads(line)
                yield from names_in({key.removeprefix("NFQ_").lower(): value for key, value in fields.items()})
    # It is no JSON where no agent answers.
    with suppress(ValueError):
        yield from names_in(json.loads(status), {"container": "container"})
    yield from ((name, "set") for name in sets_of(ruleset))
    yield from ((name, "user") for name in _users())
    # A folder of its own for the configuration.
    yield from ((str(folder), "folder") for folder in {path.parent for path in files} if _says_something(folder))
    name = socket.gethostname()
    yield from ((each, "host") for each in (name, name.partition(".")[0]))


def _says_something(folder: Path) -> bool:
    """Whether a folder of the configuration is one of this host's own."""
    return folder.is_absolute() and folder not in (
        DEFAULT_PATH.parent,
        *folders(DEFAULT_PATH),
        Path("/"),
        Path("/etc"),
        Path("/tmp"),
    )


def _users() -> set[str]:
    """The names of people on this host: its accounts, accounts of a directory that have a home here, and who runs this."""
    found = {os.environ.get(name, "") for name in ("SUDO_USER", "LOGNAME", "USER")}
    with suppress(OSError):
        found.update(os.listdir("/home"))
    with suppress(OSError):
        entries = (line.split(":") for line in _read(Path("/etc/passwd")).splitlines())
        found |= {entry[0] for entry in entries if len(entry) > 2 and entry[2].isdecimal() and 1000 <= int(entry[2]) != _NOBODY}
    # An account by the name of its distribution says nothing, and the report names the distribution.
    with suppress(OSError):
        found -= set(platform.freedesktop_os_release()["ID"].split())
    return found - {"", "root", "lost+found"}


def anonymous(text: str, known: Mapping[str, str], config: str = "") -> str:
    """The text with each address and name replaced, by the same word wherever it occurs.

    known: names without a form, by kind. config: the text of the configuration, for the names of its tables.
    """
    return Replacements(known, config).apply(text)
