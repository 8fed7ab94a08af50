"""Plain technical English: words and phrases that a reader whose third language is English stumbles over are not used."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
from made_files import made_by_cython

ROOT = Path(__file__).parents[2]
# Everything that people read: sources, scripts, units, packages, pages. Not: what is compiled, recorded or generated.
FOLDERS = (".ci", ".github", "agent", "docs", "examples", "packaging", "systemd", "tests")
UNREAD = {".so", ".gz", ".pyc", ".png", ".pcap", ".pcapng", ".typed"}
# Each with what is written instead.
INSTEAD = {
    r"whoever|whomever": "the process, user or program that is meant",
    r"somebody|someone": "another process, another program",
    r"anybody|anyone": "any host, any process",
    r"nobody": "no process, no program; without",
    r"anew": "again, fresh",
    r"aloud": "explicitly",
    r"lets? go": "release, close",
    r"goes on|go on|went on": "continue, pass, is sent on",
    r"is at it|are at it": "is still working",
    r"none the wiser": "is not affected",
    r"put right": "repaired",
    r"as it stands|as they stand": "unchanged",
    r"becomes? of|became of": "happens to",
    r"shuts? (?:itself|himself) in|(?:is|are|was|were) shut in": "confined",
    r"(?:is|are|was|were) led to": "sent to, redirected to",
    r"for ever": "without end, always",
    r"of old": "of earlier runs",
    r"all the same": "nevertheless",
    r"sits? on|sat on": "holds",
    r"(?:go|goes|went) round": "circulate, repeat",
    r"agent (?:before|after) this one": "the previous agent, the next agent",
    r"give or take": "plus or minus",
    r"\w+n't|\w+'(?:re|ve|ll)|I'm|(?:it|that|there|what|who|here|let)'s": "cannot, does not, it is: no contraction",
}
# Quoted from protocols and hosts: answers of mail servers, the user `nobody`; and this list.
ALLOWED = {
    "test_words.py": "", "test_protocols_curl.py": r"234 go on|\+OK go on", "captures.py": r"354 go on|nobody@", "mutate.py": "",
    "requirements-dev.txt": "", "test_config.py": "nobody", "test_owner_rules.py": "nobody", "test_elements_policy.py": "nobody",
    "test_rules_unprivileged.py": "nobody", "evasion_bed.py": "nobody",
}  # fmt: skip


def prose(path: Path) -> str:
    """The text of a file without what is allowed there."""
    allowed = ALLOWED.get(path.name)
    if allowed == "" or "requirements" in path.name:
        return ""
    text = path.read_text()
    return re.sub(allowed, "", text) if allowed else text


def read(path: Path) -> bool:
    """Whether people read a file. What Cython makes, coverage data and the folders of results are not read."""
    made = made_by_cython(path) or path.name.startswith(".coverage")
    return path.is_file() and path.suffix not in UNREAD and not made and not {"__pycache__", "results"} & {*path.parts}


@cache
def files() -> list[Path]:
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return sorted(path for path in (*found, *ROOT.iterdir()) if read(path))


def test_no_marker_of_a_merge_is_left() -> None:
    """As git writes them around what it could not merge (git-merge(1), "how conflicts are presented")."""
    marker = re.compile(r"^(?:<{7}|>{7}) ", re.MULTILINE)
    assert [str(path.relative_to(ROOT)) for path in files() if marker.search(path.read_text())] == []


def test_every_kind_of_file_is_read() -> None:
    names = {path.name for path in files()}
    for name in ("flow_table.pyx", "frame.pxd", "inline.bpf.c", "element.py", "inbox.pyi", "nfq-agent.8", "nfq-agent.toml.5"):
        assert name in names
    for name in ("stage", "setup.sh", "nfq-agent.postinst", "nfpm.yaml", "nfq-agent.service", "nfq-agent.sysusers", "tap.conf"):
        assert name in names
    for name in ("pyproject.toml", "mkdocs.yml", "test.yml", "README.md", "verbs.md", ".pre-commit-config.yaml", "alerts.yml"):
        assert name in names
    assert not names & {"inbox.c", "flow_table.c"}


@pytest.fixture(scope="module")
def texts() -> dict[Path, str]:
    return {path: prose(path) for path in files()}


@pytest.mark.parametrize("words", INSTEAD)
def test_words_that_are_not_used(words: str, texts: dict[Path, str]) -> None:
    pattern = re.compile(rf"\b(?:{words})\b", re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{len(text[: hit.end()].splitlines())}: {hit[0]}"
        for path, text in texts.items()
        for hit in pattern.finditer(text)
    ]
    assert not found, f"instead: {INSTEAD[words]}\n" + "\n".join(found)


def test_no_test_is_named_so() -> None:
    pattern = re.compile(r"def test_\w*(?:whoever|somebody|nobody|nobodies|anybody|anew|goes_on|bites?)\b")
    named = [path for path in files() if path.name.startswith("test_") and path.name != "test_words.py"]
    assert not [f"{path.name}: {found}" for path in named for found in pattern.findall(path.read_text())]
