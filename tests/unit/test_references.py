"""A page that a message, a help text, a unit or a shipped file refers to is in the package, and has the answer.

Keys of the configuration and of elements, for which messages refer to nfq-agent.toml(5): test_manual.py. Links between the
pages: test_site.py.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from nfq_agent.flow_filter import FIELDS, VERDICTS
from nfq_agent.protocols.known import OWNERS

TOP = Path(__file__).resolve().parents[2]
MAN8, MAN5 = "packaging/man/nfq-agent.8", "packaging/man/nfq-agent.toml.5"
# A page of docs/, another file of the repository, a page of the manual, a drop-in.
_REFERENCE = re.compile(
    r"(?P<file>\b(?:docs|tests|examples|packaging)/[\w./-]*\w)|(?P<top>\b(?:README|SECURITY|ARCHITECTURE|CONTRIBUTING)\b)"
    r"|(?:^\.BR )?(?P<man>nfq-agent(?:\.toml)?)\s?\((?P<section>\d)\)|\b(?P<drop_in>[a-z]+\.conf)(?= of the unit)"
    r"|/usr/share/nfq-agent/(?P<shared>[\w./-]*\w)",
    re.MULTILINE,
)
# Files that the packages carry besides the code, and the folder of the images and of Kubernetes.
_SHIPPED = ("systemd/*", "packaging/drop-ins/*", "packaging/man/*.[58]", "packaging/nfq-agent.toml", "packaging/monitoring/*",
            "packaging/kubernetes/*", "packaging/quadlet/*", "tests/configs/*", "examples/**/*")  # fmt: skip
# By where a reference is, and to what: words that the page must have. A new reference gets its line here.
ANSWERS: dict[tuple[str, str], tuple[str, ...]] = {
    ("agent/nfq_agent/cli/app.py", "docs/filter.md"): (
        *(f"`{name}`" for name in (*FIELDS, *VERDICTS) if name not in OWNERS),
        "dpi.md",
    ),
    ("agent/nfq_agent/cli/listeners.py", MAN8): ("IPAddressDeny=", "proxy.conf", "reject.conf"),
    ("agent/nfq_agent/config/wording.py", MAN5): ("[agent]", "[queue.NAME]", "[rules.NAME]"),
    ("agent/nfq_agent/host/bpf.py", "docs/tc.md"): ("inline.conf", "system call bpf", "CAP_BPF"),
    ("agent/nfq_agent/host/containers.py", "packaging/drop-ins/containers.conf"): ("CAP_SYS_PTRACE",),
    ("agent/nfq_agent/host/packet_socket.py", "docs/tc.md"): ("tap.conf", "AF_PACKET"),
    ("agent/nfq_agent/service/programs.py", "packaging/drop-ins/exe.conf"): ("CAP_SYS_PTRACE",),
    ("packaging/nfq-agent.toml", MAN5): ("[agent]", "[queue.NAME]", "[rules.NAME]"),
    ("packaging/kubernetes/nfq-agent.yaml", "docs/containers.md"): ("`veth*`", "`cali*`", "`lxc*`"),
    ("tests/configs/egress-policy.toml", "docs/dpi.md"): ("Names that DNS proves", 'verify = "dns"', "port 53"),
    (MAN8, MAN5): ("[agent]",),
    (MAN8, "packaging/drop-ins"): (),
    (MAN5, MAN8): ("drop-ins",),
    (MAN5, "docs/tc.md"): ("would-drop", "[tap."),
    (MAN5, "docs/dpi.md"): ("`tls_sni`", "`http_host`", "`dns_name`"),
    (MAN5, "docs/filter.md"): ("`unit`", "`name`", "`~`"),
}
# Units refer to the pages as a whole.
_PAGES: dict[tuple[str, str], tuple[str, ...]] = {
    ("systemd", MAN8): ("SERVICES", "LOGS", "EXIT STATUS"),
    ("systemd", MAN5): ("[agent]",),
    ("systemd", "packaging/drop-ins"): (),
}


def _texts(path: Path) -> Iterator[str]:
    """What a file says to its reader: of code its strings, and the docstrings that verbs and elements show."""
    text = path.read_text()
    if path.suffix != ".py" or "nfq_agent" not in path.parts:
        yield text.replace("\\-", "-").replace("\\(en", "-")
        return
    tree = ast.parse(text)
    shown = path.parent.name == "elements" or path.name.endswith("verbs.py") or path.name.endswith("_verb.py")
    inner = set()
    for node in () if shown else ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            inner.add(id(body[0].value))
    # The docstring of a module, which no verb shows.
    inner.add(id(tree.body[0].value) if tree.body and isinstance(tree.body[0], ast.Expr) else 0)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            yield node.value


def _page(found: re.Match[str]) -> str:
    """The file in the repository that a reference means."""
    if found["file"]:
        return found["file"]
    if found["top"]:
        return f"{found['top']}.md"
    if found["man"]:
        return f"packaging/man/{found['man']}.{found['section']}"
    return f"packaging/{found['shared']}" if found["shared"] else f"packaging/drop-ins/{found['drop_in']}"


def _references() -> Iterator[tuple[str, str]]:
    shipped = [path for pattern in _SHIPPED for path in TOP.glob(pattern) if path.is_file()]
    for path in [*TOP.joinpath("agent/nfq_agent").rglob("*.py"), *shipped]:
        where = path.relative_to(TOP).as_posix()
        for text in _texts(path):
            for found in _REFERENCE.finditer(text):
                page = _page(found)
                if page not in (where, "docs/NAME.md"):
                    yield ("systemd" if where.startswith(("systemd/", "packaging/quadlet/")) else where), page


def _carried(page: str) -> bool:
    """Whether the package has this file of the repository (packaging/stage)."""
    stage = (TOP / "packaging/stage").read_text()
    folders = {
        "docs": "docs/*.md",
        "examples": "examples/*.py",
        "packaging/drop-ins": "packaging/drop-ins/*.conf",
        "packaging/man": "man",
    }
    folder = page if (TOP / page).is_dir() else str(Path(page).parent)
    if folder == ".":
        return f'{page} "$doc' in stage or f'"{page}"' in "".join(each.read_text() for each in TOP.glob("docs/*.md"))
    return folder in folders and folders[folder] in stage and (TOP / page).exists()


def test_every_reference_has_its_answer() -> None:
    found = set(_references())
    answers = ANSWERS | _PAGES
    assert found - answers.keys() == set(), "add to ANSWERS what these pages must say"
    assert answers.keys() - found == set(), "these references are gone"


@pytest.mark.parametrize(("where", "page"), list(ANSWERS | _PAGES), ids=lambda each: each.rpartition("/")[2])
def test_the_page_is_in_the_package_and_has_the_answer(where: str, page: str) -> None:
    assert _carried(page), f"{where}: the package has no {page}"
    text = "" if (TOP / page).is_dir() else (TOP / page).read_text().replace("\\-", "-")
    assert [word for word in (ANSWERS | _PAGES)[where, page] if word not in text] == []


@pytest.mark.parametrize(
    ("text", "page"),
    [
        ("see docs/filter.md", "docs/filter.md"), ("(tests/bench/NOTES.md)", "tests/bench/NOTES.md"),
        (".BR nfq-agent.toml (5),", MAN5), ("see nfq-agent(8)", MAN8), ("read SECURITY", "SECURITY.md"),
        ("the drop-in exe.conf of the unit", "packaging/drop-ins/exe.conf"),
        ("/usr/share/nfq-agent/drop-ins.", "packaging/drop-ins"),
    ],
)  # fmt: skip
def test_a_reference_is_recognized(text: str, page: str) -> None:
    assert [_page(found) for found in _REFERENCE.finditer(text)] == [page]


def test_a_page_that_the_package_lacks_is_found() -> None:
    assert _carried("docs/dpi.md")
    assert _carried("SECURITY.md")
    assert not _carried("tests/bench/NOTES.md")
    assert not _carried("docs/none.md")
