"""The spellings of HTTP requests of the table against Apache, Node, HAProxy and Go.

Not every server takes each of them. The property is the one of the table: no server understands a denied name.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
from agent import until
from captures import listening
from evasion_attempt import Attempt, Try
from evasion_bed import Bed
from evasion_config import Policy
from evasion_http import MORE_SPELLINGS, SPELLINGS, alone
from evasion_others import OTHERS, Other

pytestmark = pytest.mark.kernel

POLICIES = [Policy("none"), Policy("allow-list"), Policy("block-list", "reject")]
HERE = [other for other in OTHERS if not other.missing]


class Tried:
    """Every spelling tried on every server that is here, in one family or the other."""

    def __init__(self, policy: Policy, folder: Path) -> None:
        self.folder = folder
        self.tries: dict[str, list[tuple[str, Attempt]]] = {other.name: [] for other in HERE}
        self.bed = Bed(policy, folder, more_ports=[other.port for other in HERE], serve=self._serve)
        made: list[Try] = []
        honest: list[tuple[Other, str]] = []
        for other in HERE:
            for key, (_, template, *_) in (SPELLINGS | MORE_SPELLINGS).items():
                attempt = Attempt(f"n{len(made)}", 4 + 2 * (len(made) % 2))
                self.tries[other.name].append((key, attempt))
                made.append((attempt, partial(alone, template, port=other.port), attempt.denied))
            for family in (4, 6):
                each = Attempt(f"{other.name}{family}", family)
                honest.append((other, each.allowed))
                plain = partial(alone, "GET / HTTP/1.1\r\nHost: <N>\r\n\r\n", port=other.port)
                made.append((each, plain, each.allowed))
        self.bed.run(made, False)
        for other, name in honest:
            until(lambda: self.understood(other, name), f"{other.name} understands the honest request")  # noqa: B023  # called before the next turn of the loop

    def _serve(self, bed: Bed) -> None:
        for other in HERE:
            other.start(bed.servers, bed.folder, self._log(other))
        for other in HERE:
            until(partial(listening, bed.servers, other.port), f"{other.name} listens")

    def _log(self, other: Other) -> Path:
        return self.folder / f"other-{other.name}.log"

    def understood(self, other: Other, name: str) -> bool:
        """Whether a server has written a name down."""
        whole = re.compile(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", re.IGNORECASE)
        log = self._log(other)
        return log.exists() and any(whole.search(line) for line in log.read_text(errors="replace").splitlines())


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: str(other.name))
def test_the_server_is_here(other: Other) -> None:
    if other.missing:
        pytest.skip(f"{other.program} is not installed (package {other.package}): it is not tried")


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_what_a_server_understands_is_what_is_judged(policy: Policy, tmp_path: Path) -> None:
    tried = Tried(policy, tmp_path)
    try:
        found = {
            other.name: [what for what, attempt in tried.tries[other.name] if tried.understood(other, attempt.denied)]
            for other in HERE
        }
        if policy.kind == "none":
            # The spellings are worth trying.
            assert all(len(understood) >= 8 for understood in found.values()), found
        else:
            assert not any(found.values()), found
    finally:
        tried.bed.close()
