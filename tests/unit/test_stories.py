"""The stories of the documentation: in the navigation, with configurations and commands that are valid; and what reads them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from story import DOCS, STORIES, WALKED, Command, File, Shell, steps

from nfq_agent.cli.app import two_dashes
from nfq_agent.cli.verbs import app
from nfq_agent.config.file import load

VERBS = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # it is a group
_AGENT = re.compile(r"(?<!-u )\bnfq-agent ([a-z-]+(?: (?:[^|;&<>()'2]|'[^']*'|2(?!>))*)?)")


def test_they_are_in_the_navigation_and_on_the_first_page() -> None:
    navigation = (DOCS.parent / "mkdocs.yml").read_text()
    start = (DOCS / "index.md").read_text()
    assert STORIES
    assert not [story for story in WALKED if f": {story}.md" not in navigation or f"({story}.md)" not in start]


@pytest.mark.parametrize("story", WALKED)
def test_configurations_are_valid(story: str, tmp_path: Path) -> None:
    files = [step for step in steps(story) if isinstance(step, File)]
    for file in files:
        path = tmp_path / Path(file.path).relative_to("/" if file.path.startswith("/") else "")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(file.text)
        if path.suffix == ".toml" and "[queue." in file.text:
            load(path)
    assert files


@pytest.mark.parametrize("story", WALKED)
def test_commands_parse(story: str) -> None:
    commands = [step for step in steps(story) if isinstance(step, Command)]
    called = [shlex.split(call) for command in commands for call in _AGENT.findall(command.text)]
    assert called
    for verb, *rest in called:
        VERBS[verb].make_context(verb, two_dashes(rest))


@pytest.mark.parametrize(
    ("shown", "printed", "fits"),
    [
        ("hello\n", "hello\n", True),
        ("hello\n", "hello\nmore\n", False),
        ("a ... c\n", "a b c\n", True),
        ("a ... c\n", "a\nc\n", False),
        ("...\nend\n", "end\n", True),
        ("...\nend\n", "one\ntwo\nend\n", True),
        (" pid   size\n ───── ...\n", "    pid size  \n ──── ─\n", True),
        ("a.c\n", "abc\n", False),
        ("", "hello\n", False),
    ],
)
def test_what_a_page_shows_is_the_whole_output(shown: str, printed: str, fits: bool) -> None:
    assert Command(False, "x", shown).shows(printed) is fits


def test_the_commands_of_a_page_share_a_shell() -> None:
    shell = Shell(["bash"])
    try:
        assert shell.run("cd /; sleep 60 &") == ""
        assert shell.run("pwd; cat; kill %1; wait %1; echo $?") == "/\n143\n"
        with pytest.raises(AssertionError, match=r"the page shows:\nhello\n"):
            Command(False, "echo bye", "hello\n").check(shell.run)
    finally:
        shell.close()
