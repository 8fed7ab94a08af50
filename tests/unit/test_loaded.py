"""What a running agent has in memory without elements: not what another process does for it, nor what only some do."""

from __future__ import annotations

import subprocess
import sys

import pytest

# As `nfq-agent run` loads it: until the configuration is checked, while it is, and what writes rules.
_START = """
import sys
from nfq_agent.cli.stand_in import load_when_used
load_when_used("inspect")
from nfq_agent.cli import serve
first = len(sys.modules)
serve._host()
import nfq_agent.host.xtables.backend
from nfq_agent.host.xtables import python_iptables
from nfq_agent.rules.model import RuleError
# A host without the kernel's modules runs a program that loads them.
python_iptables._modprobe = lambda module: None
try:
    python_iptables.import_iptc()
except RuleError:
    pass
print(first, *sys.modules)
"""
# pydantic checks the configuration in a process that ends. The others are used by verbs, for faults, or for programs that a start
# rarely calls; 2.4 MB and a fifth of the start in all.
_NOT = (
    "pydantic", "pydantic_core", "typing_extensions", "email", "typer", "rich", "difflib", "random", "hashlib", "traceback",
    "textwrap", "shutil", "bz2", "lzma", "subprocess", "locale", "tempfile", "logging",
    "nfq_agent.cli.show", "nfq_agent.cli.requests", "nfq_agent.config.whole", "nfq_agent.config.checking", "nfq_agent.stream",
    "nfq_agent.host.owners", "nfq_agent.service.forwarded_owners",
)  # fmt: skip


# What `inspect` needs, which is loaded when it is used. Since Python 3.13 `dataclasses` uses it for each class.
_FOR_INSPECT = ("ast", "dis", "tokenize", "linecache")


@pytest.fixture(scope="module")
def loaded() -> tuple[int, set[str]]:
    done = subprocess.run([sys.executable, "-c", _START], check=True, capture_output=True, text=True)
    first, *names = done.stdout.split()
    return int(first), set(names)


@pytest.mark.parametrize("module", [*_NOT, *(_FOR_INSPECT if sys.version_info < (3, 13) else ())])
def test_a_start_does_not_load(module: str, loaded: tuple[int, set[str]]) -> None:
    assert module not in loaded[1]


def test_what_is_loaded_before_the_check_begins_is_little(loaded: tuple[int, set[str]]) -> None:
    """The check takes longer than all that is loaded beside it, so that the start waits for each module before that."""
    first, names = loaded
    assert first < 170
    assert len(names) < 420


def said(program: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return done.stdout.split()


def test_what_is_put_in_place_of_a_module_becomes_it() -> None:
    program = """
import sys
from nfq_agent.cli.stand_in import load_when_used
load_when_used("inspect")
import inspect
print("ast" in sys.modules, inspect.signature(print) is not None, "ast" in sys.modules)
from inspect import getsource
print(inspect.isclass(int), sys.modules["inspect"].__file__ == inspect.__file__, hasattr(inspect, "nothing"))
"""
    assert said(program) == ["False", "True", "True", "True", "True", "False"]


def test_a_function_of_it_loads_it_when_it_is_called() -> None:
    program = """
import sys
from nfq_agent.cli.stand_in import load_when_used
load_when_used("importlib.metadata", "entry_points")
from importlib.metadata import entry_points
import importlib.metadata
print("email" in sys.modules, importlib.metadata is sys.modules["importlib.metadata"])
print(len(entry_points(group="console_scripts")) > 0, "email" in sys.modules)
from importlib.metadata import entry_points as real
print(real is entry_points, real is importlib.metadata.entry_points)
"""
    assert said(program) == ["False", "True", "True", "True", "False", "True"]


def test_what_is_loaded_already_stays() -> None:
    program = """
import json
from nfq_agent.cli.stand_in import load_when_used
load_when_used("json")
import sys
print(sys.modules["json"] is json)
"""
    assert said(program) == ["True"]
