"""The house: imports run one way, each foreign package has one importer, and the core does no I/O."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent / "agent" / "nfq_agent"

# From the ground up; what stands on a floor imports only from the floors below it, or from its own package (a star).
FLOORS = (
    ("verdict", "mark", "values", "rate", "interfaces", "log", "counters", "service.control", "config.lookups",
     "reassembly", "host.users", "host.sockets", "host.raw", "host.systemd", "host.fork",
     "version", "service.status"),
    ("packet", "networks", "host.child", "host.one_shot", "host.nfqueue.inbox", "protocols.*"),
    ("facts",),
    ("flow", "checksum", "host.nfqueue.channel", "proxy.processes"),
    ("reject", "element", "queue.queue", "service.packet_source"),
    ("stream", "match", "service.packet_loop"),
    ("proxy.relay",),
    ("elements.*",),
    ("config.models", "testing"),
    ("config.problems", "rules.model", "rules.plan", "rules.leaving", "service.policy_generation", "proxy.settings",
     "proxy.dialer", "proxy.listeners", "proxy.lines", "proxy.target", "proxy.tally", "proxy.upstream", "proxy.loop",
     "proxy.serve", "host.journal"),
    ("config.file", "rules.diff", "host.routes", "host.xtables.lock", "service.crew"),
    ("host.xtables.kernel", "host.xtables.nft"),
    ("host.xtables.python_iptables",),
    ("host.xtables.backend",),
    ("service.live_rules",),
    ("cli.confirm", "service.meter", "cli.running"),
    ("service.report", "cli.doctor", "cli.demo"),
    ("cli.show", "service.supervisor"),
    ("cli.show_status",),
    ("cli.verbs",),
    ("__main__",),
)  # fmt: skip

# Who may import what talks to the kernel or to systemd.
SEAMS = {
    "iptc": {"host.xtables.kernel", "host.xtables.python_iptables"},
    "netfilterqueue": {"host.nfqueue.channel"},
    "sdnotify": {"host.systemd"},
}

# No sockets, no files, no clock, no processes in what is logic only.
CORE = (
    "verdict",
    "facts",
    "packet",
    "flow",
    "element",
    "rules.model",
    "rules.plan",
    "rules.leaving",
    "rules.diff",
    "stream",
    "proxy.dialer",
    "reassembly",
    "match",
    "networks",
    "values",
    "reject",
)
EFFECTS = {"asyncio", "os", "select", "selectors", "subprocess", "threading", "time"}


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Every module by its dotted name below the package, but for the packages' own faces; what is compiled, by its types."""
    for path in sorted([*HOUSE.rglob("*.py"), *HOUSE.rglob("*.pyi")]):
        if path.name != "__init__.py":
            yield ".".join(path.relative_to(HOUSE).with_suffix("").parts), ast.parse(path.read_text())


def imported(tree: ast.Module) -> Iterator[str]:
    """The dotted names of all that a module imports, wherever in it that stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def floor(module: str) -> int:
    """Where a module stands; fails for one that has no place yet."""
    package = module.rpartition(".")[0] + ".*"
    for index, names in enumerate(FLOORS):
        if module in names or package in names:
            return index
    raise AssertionError(f"{module} has no floor in the house: say where it stands in {__file__}")


NAMES = {name for name, _ in modules()}
PACKAGES = {name.rpartition(".")[0] for name in NAMES if "." in name}


@pytest.mark.parametrize(("name", "tree"), list(modules()), ids=[name for name, _ in modules()])
def test_imports_run_one_way(name: str, tree: ast.Module) -> None:
    for whole in imported(tree):
        used = whole.removeprefix("nfq_agent.")
        if used == whole:
            continue
        if used in PACKAGES:
            used += ".*"
            if used == name.rpartition(".")[0] + ".*" or not any(used in names for names in FLOORS):
                continue
        elif used not in NAMES or used.rpartition(".")[0] == name.rpartition(".")[0] != "":
            continue
        lower = min((i for i, names in enumerate(FLOORS) if used in names), default=None)
        assert (floor(used) if lower is None else lower) < floor(name), (
            f"{name} imports {used}, which stands above it or beside it"
        )


@pytest.mark.parametrize(("name", "tree"), list(modules()), ids=[name for name, _ in modules()])
def test_each_seam_has_one_importer(name: str, tree: ast.Module) -> None:
    for whole in imported(tree):
        allowed = SEAMS.get(whole.partition(".")[0])
        assert allowed is None or name in allowed, f"{name} imports {whole}"


@pytest.mark.parametrize(("name", "tree"), [(n, t) for n, t in modules() if n in CORE or n.startswith("protocols.")])
def test_the_core_has_no_effects(name: str, tree: ast.Module) -> None:
    assert not EFFECTS & {whole.partition(".")[0] for whole in imported(tree)}


def test_what_is_compiled_imports_nothing_of_ours() -> None:
    (compiled,) = HOUSE.rglob("*.pyx")
    lines = [line.split() for line in compiled.read_text().splitlines() if "import " in line and not line.startswith(" ")]
    assert {words[0] for words in lines} == {"from"}
    assert {words[1].partition(".")[0] for words in lines} == {"cpython", "libc", "posix"}


def test_only_main_exits() -> None:
    for name, tree in modules():
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert name == "__main__" or not calls & {"sys.exit", "exit", "quit"}, name
