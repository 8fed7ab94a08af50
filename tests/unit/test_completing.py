"""Shell completion: the names of the fields of a filter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from nfq_agent.cli.completing import fields


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("uni", ["unit"]),
        ("cont", ["container"]),
        ("unit = a.service and na", ["unit = a.service and name"]),
        ("(not dst = 10.0.0.0/8 or uni", ["(not dst = 10.0.0.0/8 or unit"]),
        ("(uni", ["(unit"]),
        ("unit = ", []),
        ("unit = uni", []),
        ("unit ", []),
    ],
)
def test_fields_of_a_filter(typed: str, offered: list[str]) -> None:
    assert fields(typed) == offered


def test_with_nothing_typed_all_fields_are_offered() -> None:
    assert {"name", "unit", "verdict", "dport"} < {*fields("")}


@pytest.mark.parametrize("verb", ["top", "trace"])
def test_the_shell_is_told(verb: str) -> None:
    asked = {"_NFQ_AGENT_COMPLETE": "complete_bash", "COMP_WORDS": f"nfq-agent {verb} verd", "COMP_CWORD": "2"}
    program = "import sys; sys.argv[0] = 'nfq-agent'; from nfq_agent.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["verdict"]
