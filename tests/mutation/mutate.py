#!/usr/bin/env python3
"""Changes the nouns one place at a time and counts the changes that the unit tests notice.

tests/mutation/mutate.py [--count N] [--seed N] [MODULE ...]   (.venv's Python; 60 changes and seed 1 if not said)

Each change is made in a copy of the package, and the unit tests that name the module run on that copy. Prints every change
that no test noticed, and the score. What is noticed by a time-out counts as noticed.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Loaded once for all changes.
import hypothesis.stateful  # noqa: F401  # see above
import pytest
import scapy.layers.inet6  # noqa: F401  # see above

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "agent" / "nfq_agent"
NOUNS = (
    "checksum", "counters", "interfaces", "log", "mark", "match", "networks", "packet", "rate", "reassembly", "reject",
    "stream", "values", "verdict",
)  # fmt: skip
# The unit tests of what no unit test names: those of its only user. And of what nearly all tests name, to make a packet or to
# compare a verdict: those that are about it.
OTHERWISE = {
    "counters": ["test_counters.py", "test_status.py", "test_flow_verdicts.py"],
    "packet": ["test_packet.py", "test_copies.py", "test_flow.py", "test_checksum.py", "test_capture_sources.py"],
    "verdict": ["test_packet_loop.py", "test_outbox.py", "test_ledger.py", "test_reject.py", "test_flow_verdicts.py"],
    "interfaces": ["test_match.py", "test_elements_log.py", "test_elements_pcap.py"], "networks": ["test_elements_policy.py"],
    "rate": ["test_elements_rate_limit.py", "test_elements_syn_monitor.py", "test_reject.py"],
}  # fmt: skip
# Of a module that more files name, those of OTHERWISE are run alone.
MOST_FILES = 10
# One run of the tests of a module takes a few seconds.
SECONDS = 120
COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
CALCULATED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip


def changed(node: ast.AST) -> ast.AST | None:
    """Another node in place of this one, or None where there is nothing to change."""
    match node:
        case ast.Compare(left=left, ops=[operator], comparators=others) if type(operator) in COMPARED:
            return ast.Compare(left, [COMPARED[type(operator)]()], others)
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in CALCULATED:
            return ast.BinOp(left, CALCULATED[type(operator)](), right)
        case ast.BoolOp(op=operator, values=values):
            return ast.BoolOp(ast.Or() if isinstance(operator, ast.And) else ast.And(), values)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return operand
        case ast.Constant(value=bool(value)):
            return ast.Constant(not value)
        case ast.Constant(value=int(value)):
            return ast.Constant(value + 1)
        case ast.Break() | ast.Continue():
            return ast.Pass()
        case ast.AugAssign():
            return ast.Pass()
    return None


def places(tree: ast.Module) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """Where something can be changed within functions: the parent, its field, the place in a list, and what to put there."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef) or any("overload" in ast.unparse(each) for each in function.decorator_list):
            continue
        for parent in (inner for statement in function.body for inner in ast.walk(statement)):
            for field, value in ast.iter_fields(parent):
                for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                    if isinstance(child, ast.AST) and (other := changed(child)) is not None:
                        yield parent, field, index, other


def tests_of(module: str) -> list[str]:
    """The unit tests that name a module."""
    pattern = re.compile(rf"nfq_agent\.{module}\b")
    own = ROOT / "tests" / "unit" / f"test_{module}.py"
    named = [path for path in sorted((ROOT / "tests" / "unit").glob("test_*.py")) if pattern.search(path.read_text())]
    more = [ROOT / "tests" / "unit" / name for name in OTHERWISE.get(module, ())]
    if len(named) > MOST_FILES and more:
        named = []
    return [str(path) for path in dict.fromkeys([*([own] if own.exists() else []), *more, *named])]


def noticed(module: str, place: int, copy: Path) -> str | None:
    """Make the change of a number in the copy and run the tests; None if they fail, else what was changed."""
    source = (PACKAGE / f"{module}.py").read_text()
    tree = ast.parse(source)
    parent, field, index, other = list(places(tree))[place]
    old = getattr(parent, field) if index is None else getattr(parent, field)[index]
    said = f"{module}.py:{old.lineno}: {ast.unparse(old)}  ->  {ast.unparse(other)}"
    if index is None:
        setattr(parent, field, other)
    else:
        getattr(parent, field)[index] = other
    target = copy / "nfq_agent" / f"{module}.py"
    target.write_text(ast.unparse(ast.fix_missing_locations(tree)))
    first, *others = tests_of(module)
    try:
        # Most changes are noticed by the first.
        return said if passed([first], copy) and (not others or passed(others, copy)) else None
    finally:
        target.write_text(source)


def passed(tests: list[str], copy: Path) -> bool:
    """Whether these tests pass with the package in `copy`: in a forked child, which has pytest loaded and nothing of ours."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            nothing = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(nothing, descriptor)
            # A child that hangs is ended by it.
            signal.alarm(SECONDS)
            os.chdir(ROOT)
            sys.path.insert(0, str(copy))
            os.environ["PYTHONPATH"] = str(copy)
            # Two changes of the same size within a second have the same compiled file.
            sys.dont_write_bytecode = True
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
            loaded = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"
            # pytest-timeout sets the same alarm again for each test, and switches it off after it.
            options = ["-q", "-x", "--timeout=0", "-p", "no:cacheprovider", "--hypothesis-profile=thorough", "-W", loaded]
            code = int(pytest.main([*options, *tests]))
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def main() -> None:
    """Print what was not noticed, and the score."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("module", nargs="*", default=NOUNS)
    asked = parser.parse_args()
    possible = [
        (module, place)
        for module in asked.module
        if tests_of(module)
        for place in range(len(list(places(ast.parse((PACKAGE / f"{module}.py").read_text())))))
    ]
    chosen = random.Random(asked.seed).sample(possible, min(asked.count, len(possible)))
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(PACKAGE, copy / "nfq_agent", ignore=shutil.ignore_patterns("__pycache__"))
        for module in {module for module, _ in chosen}:
            if not passed(tests_of(module), copy):
                raise SystemExit(f"the tests of {module} fail without a change: they show nothing")
        for module, place in chosen:
            if (said := noticed(module, place, copy)) is not None:
                missed += 1
                print(f"not noticed: {said}", flush=True)
    print(f"seed {asked.seed}: {len(chosen) - missed} of {len(chosen)} changes noticed, of {len(possible)} possible ones")


if __name__ == "__main__":
    main()
