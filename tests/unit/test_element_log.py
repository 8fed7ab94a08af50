"""What elements log is limited, each by itself, and what is not written is counted; a JSON line is JSON whatever is in it."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from nfq_agent import Packet, PacketElement
from nfq_agent.config.models import ElementSpec
from nfq_agent.element import Options
from nfq_agent.flow import Flow
from nfq_agent.log import LEVELS, LogEvent, as_json
from nfq_agent.rate import LINES, WARNINGS
from nfq_agent.service.element_log import ElementLog


class Talks(PacketElement):
    def decide(self, packet: Packet, flow: Flow | None) -> None:
        self.emit("seen", src=packet.id)


class Limits(Talks):
    limits_itself = True


class World:
    """The lines that were written, and a clock that stands still."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []
        self.lost = 0
        self.now = 100.0
        self.log = ElementLog(lambda message, **fields: self.lines.append((message, fields)), self.lose, lambda: self.now)

    def lose(self, count: int) -> None:
        self.lost += count


def test_lines_beyond_the_rate_are_counted_and_said() -> None:
    world = World()
    emit = world.log.of(ElementSpec("talks", Talks, Options()))
    for number in range(5000):
        emit("seen", src=number)
    assert len(world.lines) == LINES
    assert world.lost == 5000 - LINES
    world.now += 1
    emit("seen")
    message, fields = world.lines[-1]
    assert message == "seen (4000 similar lines suppressed)"
    assert fields["suppressed"] == 4000


def test_warnings_have_a_rate_of_their_own() -> None:
    world = World()
    emit = world.log.of(ElementSpec("talks", Talks, Options()))
    for _ in range(3000):
        emit("seen")
        emit("wrong", level="warning")
        emit("worse", level="error")
    assert [fields["level"] for _, fields in world.lines].count("info") == LINES
    assert len(world.lines) == LINES + WARNINGS


def test_one_element_does_not_silence_another() -> None:
    world = World()
    first, second = (world.log.of(ElementSpec(name, Talks, Options())) for name in ("first", "second"))
    for _ in range(2000):
        first("seen")
    second("seen too")
    assert world.lines[-1][0] == "seen too"


def test_an_element_with_a_rate_of_its_own_is_not_limited() -> None:
    world = World()
    emit = world.log.of(ElementSpec("limits", Limits, Options()))
    for _ in range(5000):
        emit("seen")
    assert len(world.lines) == 5000
    # What it left out itself is counted when it says so.
    emit("7 were left out", suppressed=7)
    assert (world.lost, world.lines[-1]) == (7, ("7 were left out", {"level": "info", "suppressed": 7}))


class Odd:
    """Its text is not valid Unicode, and has quotes and a new line."""

    def __str__(self) -> str:
        return "\ud800\x00\n\"'\\"


CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)
VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.binary(), st.text(), st.just(Odd()), st.just(CIRCLE),
        st.text(st.characters(codec=None, categories=["Cs", "Cc", "Zl"])), st.sets(st.integers(), max_size=3),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.one_of(st.text(), st.tuples(st.integers())), inner)),
    max_leaves=8,
)  # fmt: skip


def _strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@given(
    level=st.sampled_from(sorted(LEVELS)),
    message=st.text(),
    fields=st.dictionaries(st.text(min_size=1), VALUES, max_size=5),
    most=st.sampled_from([None, 256, 4096]),
)
def test_a_line_is_one_json_object(level: str, message: str, fields: dict[str, Any], most: int | None) -> None:
    line = as_json(LogEvent(level, message, 1_000_000.0, fields), most)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert most is None or len(line) <= most
    found = _strict(line.decode("ascii"))
    assert found["level"] == level
    if most is None:
        assert found["message"] == message
