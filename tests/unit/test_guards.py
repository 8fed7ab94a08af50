"""The guards of the house work: ruff finds what its rules are for, mypy reads every program, hooks and the hosted run call what
exists, and the pages for newcomers are there."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
SHEBANG = b"#!"


def branches(count: int) -> str:
    """A function with so many branches: its complexity is one more."""
    return "def f(x: int) -> None:\n" + "".join(f"    if x == {number}:\n        print(x)\n" for number in range(count))


def found(code: str, name: str) -> set[str]:
    """The rules that ruff finds broken in this code, as a file of this name."""
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=json", f"--stdin-filename={name}", "-"],
        cwd=ROOT, input=code, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    return {str(each["code"]) for each in yaml.safe_load(done.stdout)}


@pytest.mark.parametrize(
    "folder", ["agent/nfq_agent", "agent/nfq_agent/rules", "agent/nfq_agent/service", "agent/nfq_agent/host"]
)
@pytest.mark.parametrize(
    ("code", "rule"),
    [
        (branches(15), "C901"),
        (branches(14), None),
        ("def f(unused: int) -> None:\n    print(1)\n", "ARG001"),
        ("def f(x: object) -> object:\n    return x._hidden\n", "SLF001"),
        ("def f() -> object:\n    import json\n\n    return json\n", "PLC0415"),
        ("def f(a, b, c, d, e, f, g, h, i):\n    print(a, b, c, d, e, f, g, h, i)\n", "PLR0913"),
    ],
)
def test_ruff_finds(folder: str, code: str, rule: str | None) -> None:
    assert found(code, f"{folder}/some_module.py") == (set() if rule is None else {rule})


def programs() -> list[Path]:
    """The Python programs and modules of the checkout that are of no package, below the folders that hold some."""
    folders = ("docs", "examples", "packaging", "tests")
    files = [
        path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    return [path for path in files if path.suffix == ".py" or python(path)]


def python(path: Path) -> bool:
    """Whether a file without a suffix names Python as what runs it."""
    with path.open("rb") as file:
        first = file.readline()
    return first.startswith(SHEBANG) and b"python" in first


def test_mypy_reads_every_program_strictly() -> None:
    settings = PROJECT["tool"]["mypy"]
    assert settings["strict"] is True
    assert not {"exclude", "ignore_errors"} & set(settings)
    assert not [each for each in settings["overrides"] if "ignore_errors" in each or each.get("follow_imports") == "skip"]
    read = [ROOT / name for name in settings["files"]]
    assert not [path for path in read if not path.exists()]
    # A folder is read as far as the names of its files say that they are Python.
    unread = [
        str(path.relative_to(ROOT))
        for path in programs()
        if path not in read and not (path.suffix == ".py" and any(path.is_relative_to(each) for each in read))
    ]
    assert unread == []


def test_ruff_reads_every_program() -> None:
    command = [sys.executable, "-m", "ruff", "check", "--show-files", "--no-cache", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert [path for path in programs() if str(path) not in done.stdout.splitlines()] == []


def commands(settings: Any) -> list[str]:
    """The commands of the hosted run."""
    return [step["run"] for job in settings["jobs"].values() for step in job["steps"] if "run" in step]


def test_the_hosted_run_calls_what_is_there() -> None:
    settings = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    # YAML 1.1 reads the key `on` as true; hosted CI does not.
    assert set(settings[True]) == {"push", "pull_request"}
    for job in settings["jobs"].values():
        assert job["runs-on"]
        assert all(("run" in step) != ("uses" in step) for step in job["steps"])
    own = [command.split() for command in commands(settings) if not command.startswith("apt-get")]
    assert [words[0] for words in own] == ["packaging/setup", "tests/run", ".ci/run"]
    for program, *_ in own:
        assert (ROOT / program).stat().st_mode & 0o111, program


def test_the_hooks_are_what_the_whole_run_checks() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    hooks = {hook["id"]: hook["entry"].split() for hook in repository["hooks"]}
    assert set(hooks) == {"ruff-format", "ruff-check", "mypy", "house"}
    whole = (ROOT / "tests/run").read_text()
    for name in ("ruff-format", "ruff-check", "mypy"):
        # Hooks mend what they can, in files that are named; the run reads all of them.
        words = [word for word in hooks[name] if word != "--fix"]
        assert f"step {' '.join(words)}" in whole
    for words in hooks.values():
        assert (ROOT / words[0]).exists()
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))


def test_a_library_whose_private_names_are_used_has_one_version() -> None:
    (pin,) = [each for each in PROJECT["project"]["dependencies"] if each.startswith("python-iptables")]
    name, equal, version = pin.partition("==")
    assert (name, equal) == ("python-iptables", "==")
    assert version.replace(".", "").isdigit()


def test_the_licence_is_the_one_that_the_package_names() -> None:
    assert PROJECT["project"]["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License\n")


@pytest.mark.parametrize(
    ("page", "words"),
    [
        (
            "CONTRIBUTING.md",
            ("packaging/setup", "tests/run --unit", "--kernel", "--booted", "imperative", "py-spy", "nsenter --net"),
        ),
        ("ARCHITECTURE.md", ("docs/images/house.svg", "cli -> service", "A packet.", "A stream.", "## Why")),
        ("SECURITY.md", ("report", "not")),
        ("CHANGELOG.md", ("### Added", "### Fixed")),
        (".editorconfig", ("root = true", "max_line_length = 130")),
    ],
)
def test_the_door_says_what_a_newcomer_asks(page: str, words: tuple[str, ...]) -> None:
    text = (ROOT / page).read_text()
    assert [word for word in words if word not in text] == []


def test_ten_usual_things_say_which_files_they_touch() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("## Add one of the usual things")[2].partition("## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| a")]
    assert len(rows) >= 10
    assert all("`" in row for row in rows)
