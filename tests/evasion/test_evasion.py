"""Every line of the table of evasions, against real servers, for each kind of policy and both families.

Without an agent each line has to work: the servers understand the denied name. With one, none may. Where a line has an
honest twin (the same bytes with allowed names alone) the twin's name has to arrive.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import evasion_elsewhere
import evasion_events
import pytest
from agent import until
from evasion_attempt import Attempt, Try, happened
from evasion_bed import Bed
from evasion_config import Policy
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
            bed.run(tries("together", raw), raw)
        self._across_events()
        bed.run(tries("flood", False), False)
        # By then what a slow server still reads has arrived.
        self.deadline = time.monotonic() + 20

    def _across_events(self) -> None:
        """Hold connections open while something happens to the agent."""
        bed, agent = self.bed, self.bed.agent
        made = tries("event", False)
        runner = threading.Thread(target=bed.run, args=(made, False))
        runner.start()

        for event, (_, do) in evasion_events.EVENTS.items():
            about = [each for each, how, _ in made if how.args[0] == event]  # type: ignore[attr-defined]  # a partial
            until(lambda: all(f"ready {event}" in bed.notes(each) for each in about), f"connections wait for {event}")  # noqa: B023  # called before the next turn of the loop
            if agent is not None:
                do(agent, bed)
            bed.attacker.run("touch", str(happened(event)))
            until(lambda: all(f"done {event}" in bed.notes(each) for each in about), f"the requests after {event}")  # noqa: B023  # called before the next turn of the loop
        runner.join()


def tries(phase: str, raw: bool) -> list[Try]:
    """The tries of a phase, honest twins included."""
    lines = [line for line in LINES if line.raw is raw and line.phase == phase]
    made = [(each := attempt(line, family), line.how, each.denied) for line in lines for family in FAMILIES]
    twins = [line for line in lines if line.twin]
    return made + [(each := attempt(line, family, True), line.how, each.allowed) for line in twins for family in FAMILIES]


def attempt(line: Line, family: int, twin: bool = False) -> Attempt:
    return Attempt(f"{'t' if twin else 'x'}{LINES.index(line)}v{family}", family, line.good, line.bad)


@pytest.fixture(scope="module", params=POLICIES, ids=str)
def tried(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tried]:
    bed = Bed(request.param, tmp_path_factory.mktemp("evasion"))
    try:
        yield Tried(bed)
    finally:
        bed.close()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("line", LINES, ids=lambda line: line.name)
def test_evasion(tried: Tried, line: Line, family: int) -> None:
    bed = tried.bed
    each = attempt(line, family)
    if line.measured is not None:
        line.measured(bed, each)
    if not line.arrives:
        return
    if bed.policy.kind == "none":
        assert arrives(tried, each.denied), f"{line.name}: no server understands {each.denied}: it is not an evasion"
    elif line.limit is None or bed.policy.kind in line.holds:
        assert not bed.understood(each.denied), bed.log()[-30:]
    else:
        assert bed.understood(each.denied), f"{line.name} is blocked: the table calls it a limit"
    if line.twin:
        allowed = attempt(line, family, True).allowed
        assert arrives(tried, allowed), f"the honest {allowed} did not arrive: {bed.log()[-30:]}"


def arrives(tried: Tried, name: str) -> bool:
    """Whether a server understands a name; one that is slow may still be at it."""
    while not (found := tried.bed.understood(name)) and time.monotonic() < tried.deadline:
        time.sleep(0.1)
    return bool(found)


@pytest.mark.parametrize("line", evasion_elsewhere.LINES, ids=lambda line: line.test.partition("::")[2])
def test_what_is_tried_elsewhere_has_its_test(line: evasion_elsewhere.Elsewhere) -> None:
    file, _, name = line.test.partition("::")
    assert f"def {name}(" in (Path(__file__).parent.parent / file).read_text()


def test_the_page_is_the_table() -> None:
    assert DOCS.read_text() == page(), "run tests/evasion/evasion_page.py > docs/evasion.md"
