"""Rules for the control groups that exist now, and what is logged when that changes."""

from __future__ import annotations

from nfq_agent.host import cgroups
from nfq_agent.log import Log, LogEvent
from nfq_agent.rules.group_tree import GroupTree
from nfq_agent.rules.groups import bound, paths
from nfq_agent.rules.model import Rule, Ruleset, TableRules
from nfq_agent.service.group_watch import GroupWatch

TAG = '-m comment --comment "nfq-agent:default:app"'
QUEUE = "-j NFQUEUE --queue-num 1 --queue-bypass"


def ruleset(*rules: str) -> Ruleset:
    """Rules of the hook OUTPUT."""
    return {"inet": {"mangle": TableRules({"C": tuple(Rule.parse(f"-A C {each}") for each in rules)})}}


def texts(rules: Ruleset) -> list[str]:
    return [each.spec for each in rules["inet"]["mangle"].rules]


def test_a_rule_carries_the_numbers_of_its_groups() -> None:
    planned = ruleset(f"-m cgroup --path a -m cgroup ! --path b {TAG} {QUEUE}", f"-p tcp {TAG} {QUEUE}")
    found = bound(planned, {"a": 11, "b": 12}, GroupTree())
    assert texts(found) == [
        f'-m cgroup --path a -m cgroup ! --path b -m comment --comment "cgroup-11-12" {TAG} {QUEUE}',
        f"-p tcp {TAG} {QUEUE}",
    ]
    first, second = found["inet"]["mangle"].rules
    assert (first.tag, first.group_numbers, second.group_numbers) == ("nfq-agent:default:app", (11, 12), ())


def test_a_group_that_does_not_exist_has_no_packets() -> None:
    planned = ruleset(f"-m cgroup --path a {TAG} {QUEUE}", f"-m cgroup ! --path a {TAG} {QUEUE}")
    assert texts(bound(planned, {"a": None}, GroupTree())) == [f"{TAG} {QUEUE}"]
    assert texts(bound(planned, {"a": 3}, GroupTree())) != texts(bound(planned, {"a": 4}, GroupTree()))


def test_names_of_rules_by_path() -> None:
    marking = "-m cgroup --path a -m comment --comment nfq-agent:default:owner-new -j CONNMARK --set-xmark 0x1/0x1"
    planned = ruleset(marking, f"-m cgroup --path a {TAG} {QUEUE}", f"-m cgroup ! --path b {TAG} {QUEUE}", f"{TAG} {QUEUE}")
    assert paths(planned) == {"a": ["app"], "b": []}


def test_what_is_logged_and_how_late_a_rule_was() -> None:
    lines: list[str] = []

    def keep(event: LogEvent) -> bool:
        lines.append(event.message)
        return True

    numbers: dict[str, int | None] = {"a": None, "b": 7}
    watch = GroupWatch(Log(keep, "info", float), numbers.__getitem__, lambda _: 5.0)
    planned = ruleset(f"-m cgroup --path a -m cgroup ! --path b {TAG} {QUEUE}")
    watch.numbers(planned)
    assert lines == [f"{cgroups.absence('a')}; rule app waits for it"]
    assert watch.waiting(planned) == ("the control group a does not exist; rule app waits for it",)
    assert not watch.changed(planned)
    watch.looked(10.0)
    before = watch.known
    numbers |= {"a": 3, "b": 8}
    assert watch.changed(planned)
    watch.numbers(planned)
    watch.followed(planned, before, 10.25)
    # It was not there a quarter of a second ago, whatever the kernel says of its age.
    assert watch.late == {"a": 0.25}
    assert lines[1].startswith("the control group a exists now: rule app is in for it, 0.25 s after the group")
    assert lines[2] == "the control group b was made again, as when its unit starts again: the rules that exclude it are in"
    numbers["a"] = None
    watch.numbers(planned)
    assert lines[3] == "the control group a is gone; rule app waits for it"
    assert watch.waiting(planned)
