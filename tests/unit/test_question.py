"""Questions on the control socket: a value of a wrong type is refused by name, whatever a client sends."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfq_agent.service.question import parse


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"verb": []}', "verb = []; allowed: a text"),
        ('{"verb": null}', "verb = null"),
        ("{}", "no verb"),
        ('{"verb": "reload", "confirm": "abc"}', 'confirm = "abc"; allowed: a number of seconds above 0, up to 86400, or null'),
        # What is said to last longer would end earlier.
        ('{"verb": "reload", "confirm": 86401}', "confirm = 86401; allowed: a number of seconds above 0, up to 86400, or null"),
        ('{"verb": "chaos", "seconds": 1e9}', "seconds = 1000000000.0; allowed: a number of seconds above 0, up to 86400"),
        ('{"verb": "reload", "confirm": NaN}', "confirm = NaN"),
        ('{"verb": "reload", "confirm": 1e999}', "confirm = Infinity"),
        ('{"verb": "reload", "confirm": true}', "confirm = true"),
        ('{"verb": "reload", "confirm": 0}', "confirm = 0"),
        ('{"verb": "confirm", "keep": []}', "keep = []"),
        ('{"verb": "confirm", "keep": true, "trial": "1"}', 'trial = "1"; allowed: the number of a trial, or null'),
        ('{"verb": "chaos", "queue": ["main"]}', 'queue = ["main"]'),
        ('{"verb": "chaos", "odds": [1]}', "odds = [1]"),
        ('{"verb": "chaos", "seconds": "1"}', 'seconds = "1"'),
        ('{"verb": "flows", "places": 5}', "places = 5"),
        ('{"verb": "flows", "places": {"worker": 5}}', "allowed: an object with three numbers for each worker"),
        ('{"verb": "flows", "places": {"worker": ["x", 0, 0]}}', "places = "),
        ('{"verb": "flows", "places": {"worker": [1, 2, 3, 4]}}', "places = "),
        ('{"verb": "flows", "places": {"worker": [-1, 2, 3]}}', "places = "),
        ('{"verb": "flows", "places": {"worker": [1e999, 2, 3]}}', "places = "),
        ('{"verb": "flows", "packets": {}}', "packets = {}"),
        ("[1]", "not a JSON object"),
        # A Python parses more levels than another: 1,000 or 10,000.
        ("[" * 100_000, "nesting"),
        ("\xff", "utf-8"),
    ],
)
def test_a_value_that_is_not_allowed_is_named(line: str, said: str) -> None:
    with pytest.raises(ValueError, match=r".") as refused:
        parse(line.encode("latin-1"))
    assert said in str(refused.value)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize("depth", [100, 2000, 100_000])
def test_nesting_of_any_depth_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=r"nesting is too deep|verb = \[\["):
        parse(b'{"verb": ' + b"[" * depth + b"]" * depth + b"}")


@pytest.mark.parametrize(
    "question",
    [
        {"verb": "status"},
        {"verb": "reload", "confirm": None},
        {"verb": "reload", "confirm": 30},
        {"verb": "confirm", "keep": True},
        {"verb": "confirm", "keep": True, "trial": 1},
        {"verb": "chaos", "queue": "main", "odds": {"drop": 0.1}, "seconds": 2.5},
        {"verb": "flows", "places": {}, "packets": None},
        {"verb": "flows", "places": {"worker of queue 1": [1, 2, (1 << 64) - 1]}, "packets": "dport = 1"},
    ],
)
def test_the_questions_of_the_verbs_pass(question: dict[str, object]) -> None:
    assert parse(json.dumps(question).encode()) == question


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(["verb", "confirm", "keep", "trial", "queue", "odds", "seconds", "places", "packets"])


@given(st.dictionaries(NAMES, VALUES))
def test_anything_else_is_refused_with_a_value_error(question: dict[str, object]) -> None:
    try:
        found = parse(json.dumps(question).encode())
    except ValueError:
        return
    assert isinstance(found["verb"], str)
    for place in (found.get("places") or {}).values():
        assert [*map(type, place)] == [int, int, int]
