"""The house: imports run one way and never in a circle, each foreign package has one importer, the core has no effects, and no
file is long."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from made_files import made_by_cython

TESTS = Path(__file__).parent
HOUSE = TESTS.parent / "agent" / "nfq_agent"

# The rooms, from the ground up. A room imports from the floors below it and from itself, never from beside or above.
# What stands at the top of the package without a room of its own is a noun. Nouns and protocols share the ground floor.
FLOORS = (
    ("nouns", "protocols"),
    ("elements",),
    ("config",),
    ("rules", "testing"),
    ("host",),
    ("capture", "proxy", "queue"),
    ("service",),
    ("cli",),
    ("__main__",),
)
GROUND = FLOORS[0]
# What the order of the floors would allow, and is forbidden.
NEVER = {("host", "config"): "the operating system's side is given values, not configurations"}

# Who may import what talks to the kernel or to systemd.
SEAMS = {
    "iptc": {"host.xtables.python_iptables"},
    "netfilterqueue": {"host.nfqueue.channel"},
    "sdnotify": {"host.systemd"},
}

# The core: bytes and time come in, decisions go out. It imports these and its own rooms, and nothing else.
CORE = {"nouns", "protocols", "rules"}
# Pure modules of other rooms: the state and the policies that are tested without a kernel.
PURE_MODULES = {
    "capture.selection", "host.nfqueue.messages", "proxy.deadlines", "proxy.dialer", "proxy.ending", "proxy.timers",
    "queue.ledger", "service.delayed", "service.drop_trace", "service.packet_judge", "service.packet_source", "service.question",
    "service.succession", "service.turn_policy", "service.watchdog",
}  # fmt: skip
PURE = {
    "__future__", "bisect", "collections", "contextlib", "dataclasses", "difflib", "enum", "fnmatch", "functools", "hashlib",
    "heapq", "hmac", "ipaddress", "itertools", "json", "math", "pydantic", "re", "shlex", "string", "struct", "types", "typing",
    "typing_extensions", "unicodedata", "zlib",
}  # fmt: skip
# Names that only calculate, from modules that also do other things; and what one module needs beyond these.
PURE_NAMES = {
    "socket.AF_INET", "socket.AF_INET6", "socket.inet_ntop", "socket.inet_pton",
    "datetime.UTC", "datetime.datetime", "datetime.timedelta", "pathlib.PurePath",
}  # fmt: skip
BEYOND = {
    "flow_ring": {"mmap": "anonymous memory that a worker shares with its supervisor"},
    "counters": {"mmap": "anonymous memory that a worker shares with its supervisor"},
    "version": {"importlib": "the version of what is installed"},
    "protocols.quic_keys": {"cryptography": "the first packets are encrypted with keys that any host on the path can derive"},
}
# Calls that reach outside, whatever the object is that they are made on.
EFFECTS = {"open", "input", "print", "exec", "eval", "compile", "breakpoint", "__import__"}
EFFECT_METHODS = {
    "open", "read_text", "read_bytes", "write_text", "write_bytes", "exists", "is_file", "is_dir", "iterdir", "glob", "stat",
    "unlink", "mkdir", "touch", "now", "utcnow", "today", "monotonic", "getenv", "environ",
}  # fmt: skip


@cache
def modules() -> dict[str, ast.Module]:
    """Every module by its dotted name below the package, but for the package's own face; what is compiled, by its types."""
    found = {}
    for path in sorted([*HOUSE.rglob("*.py"), *HOUSE.rglob("*.pyi")]):
        parts = path.relative_to(HOUSE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = ast.parse(path.read_text())
    return found


@cache
def nodes(tree: ast.Module) -> tuple[ast.AST, ...]:
    """Every node of a module, found once for all tests."""
    return tuple(ast.walk(tree))


@cache
def imported(tree: ast.Module) -> list[tuple[str, str]]:
    """Every import, wherever in the module it stands: the module, and the name taken from it, if one is."""
    found: list[tuple[str, str]] = []
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            found += [(name.name, "") for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that they can be read here"
            found += [(node.module or "", name.name) for name in node.names]
    return found


ROOMS = {room for floor in FLOORS for room in floor}


def room_of(module: str) -> str:
    """The room that a module stands in."""
    first = module.partition(".")[0]
    return first if first in ROOMS else "nouns"


def floor_of(room: str) -> int:
    """The number of a room's floor, from the ground up."""
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def used(tree: ast.Module) -> Iterator[str]:
    """The modules of ours that a module imports. Fails for the package's face, which is for others."""
    for module, name in imported(tree):
        if module == "nfq_agent" or module.startswith("nfq_agent."):
            inside = f"{module}.{name}".removeprefix("nfq_agent.")
            found = inside if inside in modules() else inside.rpartition(".")[0]
            assert found in modules(), f"{module} is imported for {name or 'all of it'}: import the module that holds it"
            yield found


def wrong_imports(name: str, tree: ast.Module) -> list[str]:
    """What a module imports from above, from beside, or from where it never may."""
    room = room_of(name)
    found = []
    for other in used(tree):
        there = room_of(other)
        below = floor_of(there) < floor_of(room) or {room, there} <= set(GROUND)
        if (room != there and not below) or (room, there) in NEVER:
            found.append(f"{name} imports {other}")
    return found


def effects(name: str, tree: ast.Module) -> list[str]:
    """What a module of the core imports or calls that is not pure."""
    found = []
    for module, taken in imported(tree):
        first = module.partition(".")[0]
        pure = first in PURE or first in BEYOND.get(name, ()) or f"{module}.{taken}" in PURE_NAMES or first == "nfq_agent"
        if not pure:
            found.append(f"{name} imports {module}.{taken}".rstrip("."))
    for node in nodes(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in EFFECTS:
            found.append(f"{name} uses {node.id}, line {node.lineno}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in EFFECT_METHODS:
            found.append(f"{name} calls {ast.unparse(node.func)}, line {node.lineno}")
    return found


def test_imports_run_one_way() -> None:
    assert [found for name, tree in modules().items() for found in wrong_imports(name, tree)] == []


def test_imports_run_in_no_circle() -> None:
    # What is compiled names types of others in its stub and imports nothing of ours.
    compiled = {path.stem for path in HOUSE.rglob("*.pyx")}
    graph = {name: set(used(tree)) for name, tree in modules().items() if name.rpartition(".")[2] not in compiled}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("host.x", "from nfq_agent.config.models import Config"),
        ("host.x", "from nfq_agent.config import models"),
        ("rules.x", "from nfq_agent.host import users"),
        ("queue.x", "from nfq_agent.proxy.loop import serve"),
        ("packet", "from nfq_agent.elements import dpi"),
        ("protocols.x", "def f():\n    from nfq_agent.config.models import Config"),
        ("service.x", "import nfq_agent.cli.verbs"),
    ],
)
def test_an_import_against_the_direction_is_found(name: str, code: str) -> None:
    assert wrong_imports(name, ast.parse(code))


def test_each_seam_has_one_importer() -> None:
    for name, tree in modules().items():
        for module, _ in imported(tree):
            allowed = SEAMS.get(module.partition(".")[0])
            assert allowed is None or name in allowed, f"{name} imports {module}"


def test_the_core_has_no_effects() -> None:
    core = [name for name in modules() if room_of(name) in CORE or name in PURE_MODULES]
    assert [found for name in core for found in effects(name, modules()[name])] == []


@pytest.mark.parametrize(
    "code",
    [
        "open('/etc/passwd')",
        "def f(read=open): ...",
        "import socket",
        "from socket import create_connection",
        "import socket as pure",
        "import pwd",
        "import datetime",
        "from datetime import datetime\ndatetime.now()",
        "from datetime import datetime\ndatetime.today()",
        "import random",
        "from random import random",
        "from pathlib import Path",
        "import pathlib\npathlib.Path('x').read_text()",
        "def f(path): return path.read_text()",
        "def f(path): path.write_text('x')",
        "import os",
        "import os.path",
        "from os import environ",
        "import time",
        "from time import monotonic",
        "import subprocess",
        "import importlib",
        "import logging",
        "import asyncio",
        "def f():\n    import sys",
        "__import__('os').getpid()",
        "eval('1')",
        "print('x')",
    ],
)
def test_an_effect_in_the_rules_is_found(code: str) -> None:
    assert effects("rules.plan", ast.parse(code))


def test_what_is_pure_is_not_taken_for_an_effect() -> None:
    code = "from socket import inet_ntop\nimport re\nfrom nfq_agent.rules.model import Rule\nre.compile('x').match('y')"
    assert effects("rules.plan", ast.parse(code)) == []


def test_what_is_compiled_imports_values_alone() -> None:
    compiled = [*HOUSE.rglob("*.pyx"), *HOUSE.rglob("*.pxd")]
    text = "\n".join(path.read_text() for path in compiled)
    lines = [line.split() for line in text.splitlines() if "import " in line and not line.startswith(" ")]
    assert {words[0] for words in lines} == {"from"}
    # From each other, from C, and the values of flows, packets and verdicts.
    own = {path.stem for path in compiled if path.suffix == ".pxd"}
    allowed = {*own, "cpython", "libc", "posix", "nfq_agent.flow", "nfq_agent.packet", "nfq_agent.verdict"}
    for _, source, *_ in lines:
        assert source in allowed or source.rpartition(".")[2] in own or source.partition(".")[0] in allowed, source


# What several modules have by the same name on purpose: each protocol declares one.
SHARED_NAMES = {"PROTOCOL"}


def types_of(tree: ast.Module) -> Iterator[str]:
    """The public classes and type aliases that a module defines."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        else:
            names = []
        yield from (name for name in names if name[0].isupper() and not (name.isupper() and len(name) == 1))


def test_no_type_has_two_meanings() -> None:
    homes: dict[str, list[str]] = {}
    for path in sorted(HOUSE.rglob("*.py")):
        for name in types_of(ast.parse(path.read_text())):
            homes.setdefault(name, []).append(str(path.relative_to(HOUSE)))
    assert {name: found for name, found in homes.items() if len(found) > 1 and name not in SHARED_NAMES} == {}


# Names of functions that had several meanings once; each has the one of its module, and of who passes it on to there.
ONE_MEANING = {"settle": {"flow_table"}, "refuse": set(), "errand": set()}


def test_what_had_two_meanings_has_one() -> None:
    for name, homes in ONE_MEANING.items():
        found = {
            module
            for module, tree in modules().items()
            for node in nodes(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name
        }
        assert found == homes, name


def test_one_module_forks() -> None:
    """Each process of our own code closes what is not its own, and has no handler of its parent."""
    calls = {"os.fork", "os.forkpty", "os.posix_spawn", "os.posix_spawnp"}
    forks = {
        name
        for name, tree in modules().items()
        for node in nodes(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in calls
    }
    assert forks == {"host.fork"}
    others = {"multiprocessing", "concurrent", "pty"}
    assert not [name for name, tree in modules().items() for module, _ in imported(tree) if module.partition(".")[0] in others]


def test_the_words_to_a_child_are_constants_of_one_module() -> None:
    words = {b"ready\n", b"stop\n", b"drain\n", b"leave\n", b"go\n", b"done\n"}
    found = {
        name
        for name, tree in modules().items()
        for node in nodes(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, bytes) and node.value in words
    }
    assert found == {"host.child"}


# What asks a worker for its class, and why. Others go by what a worker declares (`drains`) and where it registers.
ASKS_FOR_A_WORKERS_CLASS = {"service.report": "the status of a tap has other fields than that of an inline link"}


def test_workers_are_not_told_apart_by_their_class() -> None:
    asking = {
        name
        for name, tree in modules().items()
        for node in nodes(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("isinstance", "type", "issubclass")
        and "Worker" in ast.unparse(node)
    }
    assert asking == set(ASKS_FOR_A_WORKERS_CLASS)


def test_only_main_exits() -> None:
    for name, tree in modules().items():
        calls = {ast.unparse(node.func) for node in nodes(tree) if isinstance(node, ast.Call)}
        assert name == "__main__" or not calls & {"sys.exit", "exit", "quit"}, name


# An exception to a rule of ruff or mypy: on a line with code, since their own comments say nothing.
_EXCEPTION = re.compile(r"# (?:noqa|type: ignore)\b(?P<rest>.*)$", re.MULTILINE)
_WITH_REASON = re.compile(r"(?:: [A-Z0-9, ]+|\[[a-z, -]+\])(?:  [#] type: ignore\[[a-z, -]+\])?  # \S")


def without_reason(text: str) -> list[str]:
    """The exceptions that name no rule, or no reason."""
    return [found[0] for found in _EXCEPTION.finditer(text) if not _WITH_REASON.match(found["rest"])]


@pytest.mark.parametrize("folder", [HOUSE, TESTS, TESTS.parent / "examples"], ids=["package", "tests", "examples"])
def test_every_exception_has_its_reason(folder: Path) -> None:
    found = {str(path): bad for path in folder.rglob("*.py") if (bad := without_reason(path.read_text()))}
    assert found == {}


def test_an_exception_without_a_reason_is_found() -> None:
    hash_mark = "#"
    good = f"x = 1  {hash_mark} noqa: E501  {hash_mark} why\ny = 2  {hash_mark} type: ignore[misc, arg-type]  {hash_mark} why\n"
    assert without_reason(good) == []
    for bad in ("noqa", "noqa: E501", "type: ignore", "type: ignore[misc]", "type: ignore  # why", "noqa  # why"):
        assert without_reason(f"x = 1  {hash_mark} {bad}\n") == [f"{hash_mark} {bad}"]


# Lines of a file. One that grows beyond it holds more than one noun: split it by what comes apart.
LONGEST = 400


def too_long(folder: Path) -> dict[str, int]:
    """The source files that are too long, with their lines. The C that Cython makes does not count."""
    sources = [path for kind in ("*.py", "*.pyi", "*.pyx", "*.pxd", "*.c", "*.h", "*.sh") for path in folder.rglob(kind)]
    lines = {path: path.read_text().count("\n") for path in sources if not made_by_cython(path)}
    return {str(path.relative_to(folder)): count for path, count in lines.items() if count > LONGEST}


@pytest.mark.parametrize("folder", [HOUSE, TESTS], ids=["package", "tests"])
def test_no_file_is_too_long(folder: Path) -> None:
    assert too_long(folder) == {}


def test_a_file_that_is_too_long_is_found(tmp_path: Path) -> None:
    sizes = {"long.py": 401, "short.py": 400, "made.c": 9999, "made.pyx": 1, "memory_views.c": 9999, "long.bpf.c": 401}
    for name, lines in sizes.items():
        (tmp_path / name).write_text("\n" * lines)
    assert too_long(tmp_path) == {"long.py": 401, "long.bpf.c": 401}
