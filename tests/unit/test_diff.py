"""Differences, and settling them, on a model of chains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from fake_rules import FakeHost, FakeKernel, text_of
from hypothesis import given
from hypothesis import strategies as st

from nfq_agent.rules.diff import Busy, Change, Delete, DropChain, Insert, NewChain, apply_and_verify, diff, render
from nfq_agent.rules.model import Rule, RuleError, TableRules, TableState, chain_name

CHAINS = [chain_name("a", hook) for hook in ("input", "output", "forward")]


def own_rule(chain: str, port: int) -> Rule:
    return Rule.parse(f'-A {chain} -p tcp -m multiport --dports {port} -m comment --comment "nfq-agent:a:r" -j RETURN')


def own_jump(chain: str) -> Rule:
    built_in = chain.rsplit("-")[-1]
    return Rule.parse(f'-A {built_in} -m comment --comment "nfq-agent:a:jump" -j {chain}')


ports = st.lists(st.integers(1, 6), max_size=5)
tables = st.dictionaries(st.sampled_from(CHAINS), ports).map(
    lambda chosen: TableRules(
        {chain: tuple(own_rule(chain, port) for port in found) for chain, found in chosen.items()},
        tuple(own_jump(chain) for chain in chosen),
    )
)
rulesets = st.dictionaries(st.sampled_from(["raw", "mangle", "filter"]), tables).map(
    # Table raw has neither INPUT nor FORWARD.
    lambda chosen: {
        name: table for name, table in chosen.items() if name != "raw" or all(jump.chain == "OUTPUT" for jump in table.jumps)
    }
)
strangers = st.lists(
    st.tuples(
        st.sampled_from(["INPUT", "OUTPUT", *CHAINS]),
        st.sampled_from(["-p udp -j ACCEPT", "-s 10.0.0.0/8 -j DROP", "-p tcp -j RETURN"]),
        st.integers(1, 9),
    ),
    max_size=6,
)


def foreign(kernel: FakeKernel) -> dict[tuple[str, str], list[str]]:
    """What others have in their chains."""
    return {
        (name, chain): [text_of(entry.rule) for entry in entries if not entry.rule.tag.startswith("nfq-agent:a:")]
        for name, table in kernel.tables["inet"].items()
        for chain, entries in table.chains.items()
        if chain not in CHAINS and any(not entry.rule.tag.startswith("nfq-agent:a:") for entry in entries)
    }


@given(rulesets, rulesets, strangers)
def test_any_state_is_led_to_any_other(first: Any, second: Any, others: list[tuple[str, str, int]]) -> None:
    """Whatever was there, and whatever others insert in between: afterwards it is as desired, and theirs is as it was."""
    kernel = FakeKernel()
    host = FakeHost(kernel, "a")
    host.apply("inet", first)
    for chain, spec, number in others:
        for table in kernel.tables["inet"].values():
            if chain in table.chains:
                table.carry_out(f"-I {chain} {min(number, len(table.chains[chain]) + 1)} {spec}")
    before = foreign(kernel)
    applied = host.apply("inet", second)
    assert diff(second, host.read("inet")) == {}
    assert applied.after == host.read("inet")
    assert foreign(kernel) == before
    commits = kernel.commits
    assert host.apply("inet", second).changes == {}
    assert kernel.commits == commits
    host.apply("inet", {})
    assert all(state == TableState() for state in host.read("inet").values())
    assert foreign(kernel) == before


@given(rulesets, rulesets, strangers, st.integers(1, 3))
def test_a_commit_that_fails_leaves_what_was_there(
    first: Any, second: Any, others: list[tuple[str, str, int]], commit: int
) -> None:
    kernel = FakeKernel()
    host = FakeHost(kernel, "a")
    host.apply("inet", first)
    for chain, spec, _ in others:
        for table in kernel.tables["inet"].values():
            if chain in table.chains:
                table.carry_out(f"-A {chain} {spec}")
    before = {name: state for name, state in host.read("inet").items() if state != TableState()}
    others_before = foreign(kernel)
    kernel.fail_at = kernel.commits + commit
    changes = len(diff(second, host.read("inet")))
    if changes < commit:
        host.apply("inet", second)
        return
    with pytest.raises(RuleError, match="the kernel said no"):
        host.apply("inet", second)
    # The place of a jump among foreign rules is not kept; the jump is.
    after = {name: state for name, state in host.read("inet").items() if state != TableState()}
    assert {name: rules_of(state) for name, state in after.items()} == {name: rules_of(state) for name, state in before.items()}
    assert foreign(kernel) == others_before


def rules_of(state: TableState) -> tuple[Any, list[str]]:
    rules = state.as_rules()
    return rules.chains, sorted(map(str, rules.jumps))


class Script:
    """A session that reads what it is told to, and notes what it is asked to commit."""

    def __init__(self, *states: Mapping[str, TableState], answers: Sequence[Exception | None] = ()) -> None:
        self.states, self.answers = list(states), list(answers)
        self.committed: list[str] = []

    def read(self) -> Mapping[str, TableState]:
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def commit(self, table: str, changes: Sequence[Change]) -> None:
        self.committed += render({table: changes})
        if self.answers and (error := self.answers.pop(0)) is not None:
            raise error


INPUT = CHAINS[0]
WISH = {"mangle": TableRules({INPUT: (own_rule(INPUT, 1),)}, (own_jump(INPUT),))}
WISH_LINES = ["*mangle", f"+ -N {INPUT}", f"+ {own_rule(INPUT, 1)}", f"+ {own_jump(INPUT)}"]


def fulfilled() -> dict[str, TableState]:
    kernel = FakeKernel()
    return dict(FakeHost(kernel, "a").apply("inet", WISH).after)


def test_what_is_read_back_decides() -> None:
    empty = {"mangle": TableState()}
    script = Script({}, empty, empty, empty, fulfilled(), {})
    with pytest.raises(RuleError, match="differ from what was written") as caught:
        apply_and_verify(script, WISH)
    assert str(own_rule(INPUT, 1)) in str(caught.value)
    # Another try, and then a reading finds our rules after all: they are taken away again.
    assert script.committed[:8] == WISH_LINES * 2
    assert f"- -X {INPUT}" in script.committed[8:]


def test_a_table_that_another_program_changed_is_read_again() -> None:
    script = Script({}, {}, fulfilled(), answers=[Busy("changed"), None])
    assert apply_and_verify(script, WISH).after == fulfilled()
    assert script.committed == WISH_LINES * 2


def test_a_rollback_that_fails_too_says_both() -> None:
    script = Script({}, fulfilled(), answers=[RuleError("first"), RuleError("second")])
    with pytest.raises(RuleError, match="first; restoring the former rules failed too: second"):
        apply_and_verify(script, WISH)


def test_own_chains_are_filled_before_the_jump_and_emptied_before_any_is_deleted() -> None:
    both = {
        "mangle": TableRules(
            {chain: (own_rule(chain, 1),) for chain in CHAINS[:2]}, tuple(own_jump(chain) for chain in CHAINS[:2])
        )
    }
    kinds = [type(change) for change in diff(both, {})["mangle"]]
    assert kinds == [NewChain, Insert, NewChain, Insert, Insert, Insert]
    state = FakeHost(FakeKernel(), "a").apply("inet", both).after
    kinds = [type(change) for change in diff({}, state)["mangle"]]
    assert kinds == [Delete, Delete, Delete, Delete, DropChain, DropChain]


def test_what_only_takes_away_comes_first() -> None:
    kernel = FakeKernel()
    host = FakeHost(kernel, "a")
    old = {"raw": TableRules({CHAINS[1]: ()}, (own_jump(CHAINS[1]),)), "nat": TableRules({CHAINS[1]: ()}, ())}
    state = host.apply("inet", old).after
    script = Script(state, fulfilled())
    apply_and_verify(script, WISH)
    assert [line for line in script.committed if line.startswith("*")] == ["*nat", "*raw", "*mangle"]


def test_changes_as_people_read_them() -> None:
    state = fulfilled()
    changed = {"mangle": TableRules({INPUT: (own_rule(INPUT, 2),)}, (own_jump(INPUT),))}
    assert list(render(diff(changed, state))) == ["*mangle", f"- {own_rule(INPUT, 1)}", f"+ {own_rule(INPUT, 2)}"]
