"""What packaging/lean leaves of a file: the same program, on the same lines, with the words about its rights."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
from packaged import program

from nfq_agent.cli.verbs import app

TOP = Path(__file__).resolve().parent.parent.parent
lean = program("lean")


def code(text: str) -> str:
    """The tree of a program with its lines, without strings that stand alone."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            node.body = [  # type: ignore[attr-defined]  # it has one
                each for each in body if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant)
                                              and isinstance(each.value.value, str))
            ]  # fmt: skip
    return ast.dump(tree, include_attributes=False) + str([getattr(node, "lineno", 0) for node in ast.walk(tree)])


@pytest.mark.parametrize("file", sorted((TOP / "agent/nfq_agent/elements").glob("*.py")), ids=lambda file: file.name)
def test_a_program_stays_the_same_on_the_same_lines(file: Path) -> None:
    text = file.read_text()
    short = lean.lean(text)
    assert code(short) == code(text)
    assert len(short) <= len(text) + len("# Changed for the package of nfq-agent: without comments and docstrings.\n")


_WHOLE = '''#!/usr/bin/python3
# Copyright of a person
"""What it is."""
x = "# no comment"  # a comment after ünï


def shown() -> None:
    """Help."""


class _Own:
    """Two
    lines."""

    y = 1; "a string beside"
'''


def test_comments_and_docstrings_go_and_the_rights_stay() -> None:
    head = "#!/usr/bin/python3\n# Copyright of a person\n"
    assert lean.lean(_WHOLE) == (
        head + "''\nx = \"# no comment\"  \n\n\ndef shown() -> None:\n    ''\n\n\nclass _Own:\n    ''\n\n\n    y = 1; ''\n"
        "# Changed for the package of nfq-agent: without comments and docstrings.\n"
    )


def test_python_writes_no_docstring_of_a_dataclass_itself() -> None:
    text = 'import dataclasses\n\n\n@dataclasses.dataclass(frozen=True)\nclass A:\n    """Words."""\n\n    x: int = 1\n'
    made: dict[str, Any] = {}
    exec(lean.lean(text), made)
    assert made["A"].__doc__ == "."
    assert made["A"]() == made["A"](1)


def test_documentation_of_public_names_can_stay() -> None:
    short = lean.lean(_WHOLE, True)
    assert '"""What it is."""' in short
    assert '"""Help."""' in short
    assert "Two" not in short
    assert "a comment" not in short


def test_a_licence_in_a_docstring_stays() -> None:
    assert lean.lean('"""Licensed to you."""\n').startswith('"""Licensed to you."""\n')


@pytest.mark.parametrize("text", ["", "\n", "# a comment", "x = 1"])
def test_the_smallest_files(text: str) -> None:
    assert ast.dump(ast.parse(lean.lean(text))) == ast.dump(ast.parse(text))


def test_what_is_no_program_is_refused() -> None:
    with pytest.raises(SyntaxError):
        lean.lean("def")


def test_the_verbs_keep_their_help() -> None:
    # packaging/stage keeps the documentation of public names of cli/.
    assert len(app.registered_commands) > 20
    for each in app.registered_commands:
        assert each.callback
        assert each.callback.__module__.startswith("nfq_agent.cli.")
        assert not each.callback.__name__.startswith("_")
        text = lean.lean(inspect.getsource(inspect.unwrap(each.callback)), True)
        assert ast.get_docstring(ast.parse(text).body[0]) == inspect.getdoc(each.callback)
