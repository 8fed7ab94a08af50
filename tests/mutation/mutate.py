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
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "agent" / "nfq_agent"
NOUNS = (
    "checksum", "counters", "flow", "interfaces", "log", "mark", "match", "networks", "packet", "rate", "reassembly", "reject",
    "stream", "values", "verdict",
)  # fmt: skip
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
    return [str(path) for path in dict.fromkeys([*([own] if own.exists() else []), *named])]


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
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests_of(module)],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(copy)}, stdin=subprocess.DEVNULL, capture_output=True, timeout=120,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None
    finally:
        target.write_text(source)
    return said if done.returncode == 0 else None


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
        for module, place in chosen:
            if (said := noticed(module, place, copy)) is not None:
                missed += 1
                print(f"not noticed: {said}", flush=True)
    print(f"seed {asked.seed}: {len(chosen) - missed} of {len(chosen)} changes noticed, of {len(possible)} possible ones")


if __name__ == "__main__":
    main()
