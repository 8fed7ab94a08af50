"""The documentation site: every page and link of it, with warnings as errors."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from unmeasured import unmeasured

TOP = Path(__file__).resolve().parents[2]


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    site = tmp_path / "site"
    # None of our code is run.
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", site],
        cwd=TOP, env={**unmeasured(), "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for page in TOP.joinpath("docs").glob("*.md"):
        folder = site if page.stem == "index" else site / page.stem
        assert (folder / "index.html").is_file(), page


@pytest.mark.parametrize("page", sorted((TOP / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_a_page_has_one_title_so_that_it_has_a_table_of_contents(page: Path) -> None:
    text = page.read_text()
    if whole := re.fullmatch(r'--8<-- "(.*)"\n', text):
        text = (TOP / whole[1]).read_text()
    outside_of_code = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert len(re.findall(r"^# ", outside_of_code, re.MULTILINE)) == 1


def test_the_plot_shows_the_table() -> None:
    plot = subprocess.run([sys.executable, TOP / "docs/make-plot"], capture_output=True, text=True, check=True).stdout
    assert plot == (TOP / "docs/images/benchmark.svg").read_text()
    table = (TOP / "tests/bench/NOTES.md").read_text()
    for figure in re.findall(r">([\d,.]+ [a-zA-Z1][^<]*)</text>", plot):
        assert f"| {figure} |" in table
    page = (TOP / "docs/comparison.md").read_text()
    for program in ("Suricata", "OpenSnitch", "nfqws", "mitmproxy", "HAProxy", "NeuVector"):
        assert f"**{program}**" in page.partition("## What they do better")[2]


def test_pages_of_the_top_folder_are_in_it() -> None:
    for page in ("ARCHITECTURE", "CONTRIBUTING", "SECURITY", "CHANGELOG"):
        assert (TOP / "docs" / f"{page.lower()}.md").read_text() == f'--8<-- "{page}.md"\n'
        assert (TOP / f"{page}.md").read_text().startswith("# ")
