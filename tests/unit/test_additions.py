"""What an addition touches: at most four files, and ARCHITECTURE.md and CONTRIBUTING.md name them."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
import typer

from nfq_agent.cli.verbs import app
from nfq_agent.counters import VERDICT_COUNTERS
from nfq_agent.log import LogEvent, as_json, console, journal
from nfq_agent.verdict import Action

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "agent" / "nfq_agent"
MOST = 4
KINDS = ("a verdict kind", "a counter", "a field of the log", "a protocol", "a verb")


def row(page: str, kind: str) -> str:
    (found,) = re.findall(rf"^\| {kind} \| (.*) \|$", (ROOT / page).read_text(), re.MULTILINE)
    return str(found)


def naming(word: str) -> set[str]:
    """The files that ship or explain the agent and contain a word; the changelog tells of it, the tests test it."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("packaging/man/*"), *ROOT.glob("systemd/*")]
    sources = [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyx"), *PACKAGE.rglob("*.pyi")]
    return {
        str(path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT))
        for path in (*pages, *sources)
        if path.name != "CHANGELOG.md" and re.search(rf"\b{word}\b", path.read_text())
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_pages_name_the_same_files_and_each_exists(kind: str) -> None:
    text = row("ARCHITECTURE.md", kind)
    assert text == row("CONTRIBUTING.md", kind)
    paths = [path for path in re.findall(r"`([\w/-]+(?:\.\w+|/make[\w-]+))`", text) if "NAME" not in path]
    assert not [path for path in paths if not (PACKAGE / path).exists() and not (ROOT / path).exists()]
    others = len(re.findall(r"the module|NAME\.py|its page", text))
    assert 2 <= len([path for path in paths if "/make" not in path]) + others <= MOST


@pytest.mark.parametrize(
    ("word", "files"),
    [
        ("bugreport", {"cli/verbs.py", "cli/bugreport.py", "README.md", "docs/verbs.md"}),
        ("log_suppressed", {"counters.py", "service/packet_judge.py", "docs/verbs.md"}),
        ("bittorrent", {"protocols/bittorrent.py", "protocols/known.py", "docs/dpi.md"}),
    ],
)
def test_what_was_added_is_named_where_the_table_says_and_nowhere_else(word: str, files: set[str]) -> None:
    assert naming(word) == files
    assert len(files) <= MOST


def test_each_verdict_kind_has_its_counter_in_the_status() -> None:
    assert set(VERDICT_COUNTERS) == set(Action)
    page = (ROOT / "docs" / "verbs.md").read_text()
    assert not [name for name in VERDICT_COUNTERS.values() if f"`{name}`" not in page]


def test_a_new_verb_is_in_the_manual_and_a_new_flag_too() -> None:
    """The manual is made from the command line, as the packages are built."""
    fill = runpy.run_path(str(ROOT / "packaging" / "man" / "fill"))

    def brand_new(color: str = typer.Option("", "--color", metavar="NAME", help="Which color.")) -> int:
        """Do what no verb does."""
        return len(color)

    before = list(app.registered_commands)
    app.command()(brand_new)
    try:
        text = fill["page"](ROOT / "packaging" / "man" / "nfq-agent.8")
    finally:
        app.registered_commands[:] = before
    assert ".B brand\\-new\nDo what no verb does." in text
    assert ".B \\-\\-color NAME\nWhich color." in text
    with pytest.raises(ValueError, match="no line"):
        fill["page"](ROOT / "README.md")


def test_a_new_field_of_the_log_is_in_every_format_by_itself() -> None:
    event = LogEvent("info", "message", 1.0, {"brand_new": 7})
    assert json.loads(as_json(event))["brand_new"] == 7
    assert b"NFQ_BRAND_NEW=7\n" in journal(event)
    assert console(event).endswith(b"message\n")
