"""Every line of the table of evasions, against real servers, for each kind of policy and both families.

Without an agent each line has to work: the servers understand the denied name. With one, none may. Where a line has an
honest twin (the same bytes with allowed names alone) the twin's name has to arrive.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import evasion_elsewhere
import pytest
from evasion_bed import Attempt, Bed, Policy
from evasion_line import Line
from evasion_page import LINES, page

pytestmark = pytest.mark.kernel

DOCS = Path(__file__).parent.parent.parent / "docs" / "evasion.md"
POLICIES = [Policy("none"), *(Policy(kind, action) for kind in ("allow-list", "block-list") for action in ("drop", "reject"))]
FAMILIES = (4, 6)


class Tried:
    """A bed in which everything has been tried."""

    def __init__(self, bed: Bed) -> None:
        self.bed = bed
        for raw in (False, True):
            lines = [line for line in LINES if line.raw is raw]
            tries = [(each := attempt(line, family), line.how, each.denied) for line in lines for family in FAMILIES]
            twins = [line for line in lines if line.twin]
            tries += [(each := attempt(line, family, True), line.how, each.allowed) for line in twins for family in FAMILIES]
            if tries:
                bed.run(tries, raw)


def attempt(line: Line, family: int, twin: bool = False) -> Attempt:
    return Attempt(f"{'t' if twin else 'x'}{LINES.index(line)}v{family}", family)


@pytest.fixture(scope="module", params=POLICIES, ids=str)
def tried(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tried]:
    bed = Bed(request.param, tmp_path_factory.mktemp("evasion"))
    try:
        yield Tried(bed)
    finally:
        bed.close()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("line", LINES, ids=lambda line: line.name)
def test_evasion(tried: Tried, line: Line, family: int, request: pytest.FixtureRequest) -> None:
    policy = tried.bed.policy
    denied = attempt(line, family).denied
    if policy.kind == "none":
        assert arrives(tried.bed, denied), f"{line.name}: no server understands {denied}: it is no evasion"
        return
    lines = tried.bed.understood(denied)
    if line.still_open:
        request.node.add_marker(pytest.mark.xfail(reason=f"still open: {line.still_open}", strict=False))
    if line.limit is None or policy.kind in line.holds:
        assert not lines, tried.bed.agent and tried.bed.agent.log[-3000:]
    else:
        assert lines, f"{line.name} is blocked: the table calls it a limit"
    if line.twin:
        allowed = attempt(line, family, True).allowed
        assert arrives(tried.bed, allowed), f"the honest {allowed} did not arrive: " + (
            tried.bed.agent.log[-3000:] if tried.bed.agent else ""
        )


def arrives(bed: Bed, name: str) -> bool:
    """Whether a server understands a name; one that is slow may still be at it."""
    deadline = time.monotonic() + 60
    while not (found := bed.understood(name)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return bool(found)


@pytest.mark.parametrize("line", evasion_elsewhere.LINES, ids=lambda line: line.test.partition("::")[2])
def test_what_is_tried_elsewhere_has_its_test(line: evasion_elsewhere.Elsewhere) -> None:
    file, _, name = line.test.partition("::")
    assert f"def {name}(" in (Path(__file__).parent.parent / file).read_text()


def test_the_page_is_the_table() -> None:
    assert DOCS.read_text() == page(), "run tests/evasion/evasion_page.py > docs/evasion.md"
