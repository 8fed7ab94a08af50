"""What a running agent has in memory without elements: not what another process does for it, nor what only some do."""

from __future__ import annotations

import subprocess
import sys

import pytest
from unmeasured import unmeasured

# As `nfq-agent run` loads it: until the configuration is checked, while it is, and what writes rules.
_START = """
import sys
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


@pytest.fixture(scope="module")
def loaded() -> tuple[int, set[str]]:
    done = subprocess.run([sys.executable, "-c", _START], env=unmeasured(), check=True, capture_output=True, text=True)
    first, *names = done.stdout.split()
    return int(first), set(names)


@pytest.mark.parametrize("module", _NOT)
def test_a_start_does_not_load(module: str, loaded: tuple[int, set[str]]) -> None:
    assert module not in loaded[1]


def test_what_is_loaded_before_the_check_begins_is_little(loaded: tuple[int, set[str]]) -> None:
    """The check takes longer than all that is loaded beside it, so that the start waits for each module before that."""
    first, names = loaded
    assert first < 170
    assert len(names) < 420
