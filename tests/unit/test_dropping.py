"""Whether a chain of others drops what it does not accept, by the values of its rules."""

from __future__ import annotations

import pytest

from nfq_agent.rules.dropping import ForeignRule, Share, drops

ALL, SOME, BROAD, TRANSLATED = Share.ALL, Share.SOME, Share.BROAD, Share.TRANSLATED
DROP, ACCEPT = ForeignRule(ALL, "drop"), ForeignRule(ALL, "accept")
ZONES = {"zone": [ForeignRule(SOME, "accept"), DROP], "open": [ACCEPT], "log": [ForeignRule(ALL, ""), ForeignRule(SOME, "drop")]}


@pytest.mark.parametrize(
    ("rules", "policy", "expected"),
    [
        ([], False, False),
        ([], True, True),
        ([ForeignRule(SOME, "accept"), DROP], False, True),
        ([ForeignRule(SOME, "drop")], False, False),
        ([ACCEPT], True, False),
        ([ACCEPT, DROP], False, False),
        ([ForeignRule(BROAD, "accept"), DROP], False, True),
        ([ForeignRule(BROAD, "drop"), ACCEPT], False, True),
        ([ForeignRule(ALL, "jump", "log")], False, False),
        ([ForeignRule(BROAD, "goto", "zone"), ACCEPT], False, True),
        ([ForeignRule(ALL, "jump", "open"), DROP], False, False),
        ([ForeignRule(BROAD, "jump", "open"), DROP], False, True),
        ([ForeignRule(ALL, "goto", "log"), DROP], False, False),
        ([ForeignRule(ALL, "goto", "log"), ACCEPT], True, True),
        ([ForeignRule(ALL, "return"), DROP], False, False),
        ([ForeignRule(ALL, "jump", "in"), DROP], False, True),
    ],
)
def test_the_end_of_a_chain(rules: list[ForeignRule], policy: bool, expected: bool) -> None:
    assert drops("in", {**ZONES, "in": rules}.__getitem__, policy, translated=False) == expected


@pytest.mark.parametrize("translated", [True, False])
def test_a_rule_that_accepts_what_is_translated(translated: bool) -> None:
    rules = {"in": [ForeignRule(TRANSLATED, "accept"), DROP]}
    assert drops("in", rules.__getitem__, True, translated) is not translated
