"""Prints the lines that the tests cover, by room of the house and by kind of test; `tests/run` calls it.

FOLDER holds one folder for each kind of test, with a coverage data file `data` in it. With `--floor PERCENT` it fails unless
the unit tests cover that much outside host/, and some of every module.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from coverage import Coverage

HOUSE = Path(__file__).resolve().parent.parent.parent / "agent" / "nfq_agent"
Lines = set[tuple[Path, int]]


def lines_of(data: Path) -> tuple[Lines, Lines]:
    """Every line that is code, and those of them that were run."""
    paths = sorted(HOUSE.rglob("*.py"))
    # Reading the source of the package takes seconds: a share of the modules for each core.
    shares = [paths[start :: os.cpu_count()] for start in range(os.cpu_count() or 1)]
    code: Lines = set()
    run: Lines = set()
    with ProcessPoolExecutor() as processes:
        for found, of_them_run in processes.map(partial(lines_in, data), shares):
            code |= found
            run |= of_them_run
    return code, run


def lines_in(data: Path, paths: list[Path]) -> tuple[Lines, Lines]:
    """The same of these modules."""
    measured = Coverage(data_file=str(data), config_file=str(HOUSE.parent.parent / "pyproject.toml"))
    measured.load()
    code: Lines = set()
    missing: Lines = set()
    for path in paths:
        _, statements, _, not_run, _ = measured.analysis2(str(path))
        name = path.relative_to(HOUSE)
        code |= {(name, line) for line in statements}
        missing |= {(name, line) for line in not_run}
    return code, code - missing


def share(part: Lines, whole: Lines) -> float:
    """Percent of the lines."""
    return 100.0 * len(part) / len(whole) if whole else 100.0


def room_of(path: Path) -> str:
    """The folder of a module; a noun's is the package itself."""
    return path.parts[0] + "/" if len(path.parts) > 1 else "nouns"


def main() -> int:
    """Print the table; 1 if a floor was asked for and is not reached."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--floor", type=float)
    asked = parser.parse_args()
    kinds = {path.parent.name: lines_of(path) for path in sorted(asked.folder.glob("*/data"), reverse=True)}
    code = next(iter(kinds.values()))[0]
    run = {kind: lines for kind, (_, lines) in kinds.items()}
    if len(run) > 1:
        run["all"] = set().union(*run.values())
    rooms: dict[str, Lines] = defaultdict(set)
    for path, line in code:
        rooms[room_of(path)].add((path, line))
    rooms["outside host/"] = {each for each in code if room_of(each[0]) != "host/"}
    print(f"{'lines covered':<16}{'lines':>7}" + "".join(f"{kind:>9}" for kind in run))
    for room, inside in rooms.items():
        print(f"{room:<16}{len(inside):>7}" + "".join(f"{share(lines & inside, inside):>8.1f}%" for lines in run.values()))
    if asked.floor is None:
        return 0
    outside = rooms["outside host/"]
    reached = share(run["unit"] & outside, outside)
    untouched = sorted({str(path) for path, _ in outside} - {str(path) for path, _ in run["unit"]})
    weakest = sorted(
        (share({x for x in run["unit"] if x[0] == path}, {x for x in code if x[0] == path}), str(path))
        for path in {path for path, _ in outside}
    )[:10]
    print("least covered by the unit tests: " + ", ".join(f"{path} {percent:.0f}%" for percent, path in weakest))
    if untouched:
        print(f"covered by no unit test: {', '.join(untouched)}", file=sys.stderr)
    if reached < asked.floor:
        print(f"the unit tests cover {reached:.1f} % outside host/; at least {asked.floor:g} % is wanted", file=sys.stderr)
    return int(bool(untouched) or reached < asked.floor)


if __name__ == "__main__":
    sys.exit(main())
