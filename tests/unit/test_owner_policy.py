"""The rules of a policy by owner as rules of the kernel in front of the queue: which, as what, and for which control groups."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import pytest

from nfq_agent.config.models import Config
from nfq_agent.host.nftables.expressions import encode
from nfq_agent.rules.group_tree import DEEPEST, GroupTree, condition
from nfq_agent.rules.groups import bound
from nfq_agent.rules.kernel_policy import NOT_RECORDED, reasons
from nfq_agent.rules.model import AT_LEVEL, Family, Rule
from nfq_agent.rules.owner_steps import MOST, owner_policy
from nfq_agent.rules.plan import plan
from nfq_agent.service.group_walk import GroupWalk

TREE = [
    (1, "/"), (2, "/system.slice"), (3, "/system.slice/web.service"), (4, "/system.slice/web.service/worker"),
    (5, "/system.slice/db.service"), (6, "/machine-shop.scope"),
]  # fmt: skip
WEB: dict[str, Any] = {"action": "accept", "unit": "web.service", "dport": [443], "protocol": ["tcp"]}
SHOP: dict[str, Any] = {"action": "drop", "container": "shop"}


def config_of(
    rules: list[dict[str, Any]], default: str | None = "drop", selected: dict[str, Any] | None = None, **queue: Any
) -> Config:
    element: dict[str, Any] = {"type": "policy", "rule": rules} | ({} if default is None else {"default": default})
    return Config.model_validate({
        "agent": {"backend": "owned"},
        "queue": {"main": {"num": 100, "compile": "auto", "elements": ["allow", "offload"], "log_drops": False, **queue}},
        "element": {"allow": element, "offload": {"mark": "0x1/0xf"}, "rate-limit": {"rate": "1/s"}},
        "rules": {"app": {"queue": "main", "hooks": ["output"], "tcp_ports": ["1:65535"], **(selected or {})}},
    })  # fmt: skip


def text(config: Config, groups: Iterable[tuple[int, str]] = TREE, family: Family = "inet", hook: str = "OUTPUT") -> list[str]:
    """The rules of the queue's chain between those that keep verdicts and the last."""
    ruleset = bound(plan(config, 972, lists=True), {}, GroupTree(groups))
    lines = [
        re.sub('-m comment --comment "nfq-agent:default:(.*)"', r"# \1", rule.spec).removeprefix("-p tcp ")
        for rule in ruleset[family]["mangle"].chains[f"NFQA-default-{hook}"]
    ]
    return [line.replace("-m multiport --ports 1:65535 ", "") for line in lines if not re.search("own-traffic|offload|end", line)]


QUEUE = "# app -j NFQUEUE --queue-num 100 --queue-bypass"
HEAD = [f"-m conntrack ! --ctstate NEW {QUEUE}", f"-m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN {QUEUE}"]


def test_each_level_is_asked_from_the_deepest_up() -> None:
    assert text(config_of([WEB, SHOP])) == [
        *HEAD,
        # Of a group below all known ones nothing is known.
        f"-m group --level 4 {QUEUE}",
        "-m group --level 3 --numbers 4 -m multiport --dports 443 # app.allow.1 -j RETURN",
        "-m group --level 3 --numbers 4 # app.allow.default -j DROP",
        f"-m group --level 3 {QUEUE}",
        "-m group --level 2 --numbers 3 -m multiport --dports 443 # app.allow.1 -j RETURN",
        "-m group --level 2 --numbers 3,5 # app.allow.default -j DROP",
        f"-m group --level 2 {QUEUE}",
        "-m group --level 1 --numbers 6 # app.allow.2 -j DROP",
        "-m group --level 1 --numbers 2,6 # app.allow.default -j DROP",
        f"-m group --level 1 {QUEUE}",
        "-m group --level 0 --numbers 1 # app.allow.default -j DROP",
        QUEUE,
    ]


def test_without_groups_in_the_kernel_the_rules_before_the_first_by_owner_are_its_own() -> None:
    names = {"action": "accept", "dport": [53], "protocol": ["tcp"]}
    config = config_of([names, WEB, names, SHOP])
    made = plan(config, 972, lists=True, groups=False)["inet"]["mangle"].chains["NFQA-default-OUTPUT"]
    assert not any(match.name == AT_LEVEL for rule in made for match in rule.matches)
    assert [rule.tag.rpartition(":")[2] for rule in made if rule.target.name == "RETURN"][-2:] == ["app.allow.1", "end"]
    # Where the first names an owner, nothing is asked in front of the queue.
    made = plan(config_of([WEB, names]), 972, lists=True, groups=False)["inet"]["mangle"].chains["NFQA-default-OUTPUT"]
    assert [rule.tag for rule in made if rule.queues] == ["nfq-agent:default:app"]


def test_a_group_is_asked_for_first() -> None:
    """Of rules for deeper groups, the rest is not asked then: 40 of these come before a rule for the root alone."""
    rule = Rule.parse("-A NFQA-default-OUTPUT -p tcp -m multiport --ports @p -m group --level 3 --numbers @g -j RETURN")
    for made in encode(rule, "inet", str, native_queue=False):
        assert [each.name for each in made][:4] == ["socket", "lookup", "meta", "cmp"]


def test_what_is_accepted_gets_the_mark_of_offload() -> None:
    (table,) = plan(config_of([WEB]), 972, lists=True)["inet"].values()
    specs = [rule.spec for rule in table.chains["NFQA-default-OUTPUT"] if "--level 2" in rule.spec]
    marked, passed, *_ = [spec for spec in specs if "443" in spec]
    assert marked.endswith('"nfq-agent:default:offload-new" -j CONNMARK --set-xmark 0x1/0xf')
    assert passed.endswith('"nfq-agent:default:app.allow.1" -j RETURN')
    assert marked.partition("-m comment")[0] == passed.partition("-m comment")[0]


def test_without_offload_the_queue_gets_what_is_accepted() -> None:
    found = text(config_of([WEB, SHOP], elements=["allow"]))
    assert f"-m group --level 2 --numbers 3 -m multiport --dports 443 {QUEUE}" in found
    assert not any("app.allow.1" in line or "RETURN" in line for line in found)
    assert "-m group --level 2 --numbers 3,5 # app.allow.default -j DROP" in found


def test_what_may_match_more_than_the_kernel_sees_goes_to_the_queue() -> None:
    rules = [{**WEB, "exe": "/bin/x"}, {"action": "reject", "unit": "db.service"}, SHOP]
    assert [line for line in text(config_of(rules, None)) if "--numbers" in line] == [
        f"-m group --level 3 --numbers 4 -m multiport --dports 443 {QUEUE}",
        f"-m group --level 2 --numbers 3 -m multiport --dports 443 {QUEUE}",
        f"-m group --level 2 --numbers 5 {QUEUE}",
        "-m group --level 1 --numbers 6 # app.allow.3 -j DROP",
    ]


def test_rules_on_headers_alone_stand_in_front_of_the_groups() -> None:
    found = text(config_of([{"action": "drop", "dport": [25]}, WEB]))
    assert found[2] == "-m multiport --dports 25 # app.allow.1 -j DROP"
    # Between two that name owners they are asked of known groups.
    found = text(config_of([WEB, {"action": "drop", "dport": [25]}]))
    assert "-m group --level 2 --numbers 3,5 -m multiport --dports 25 # app.allow.2 -j DROP" in found


def test_first_packets_go_to_the_queue_at_a_rate() -> None:
    config = config_of([WEB], None, compile="first", elements=["allow", "offload", "record"])
    lines = [line for line in text(config) if "--level 2 --numbers" in line]
    matches = "-m group --level 2 --numbers 3 -m multiport --dports 443"
    assert lines == [
        f"{matches} -m limit --limit 100/sec --limit-burst 100 {QUEUE}", f"{matches} # app.allow.unrecorded",
        f"{matches} # app.allow.1 -j RETURN",
    ]  # fmt: skip
    assert reasons(config)["app.allow.unrecorded"] == ("main", "allow", NOT_RECORDED)


def test_what_is_dropped_goes_to_the_queue_at_the_rate_of_the_log() -> None:
    lines = [line for line in text(config_of([SHOP], None, log_drops=True)) if "--numbers" in line]
    assert lines == [
        f"-m group --level 1 --numbers 6 -m limit --limit 100/sec --limit-burst 100 {QUEUE}",
        "-m group --level 1 --numbers 6 # app.allow.1 -j DROP",
    ]


def test_protocols_without_an_owner_go_to_the_queue() -> None:
    found = text(config_of([SHOP], None, {"all": True, "tcp_ports": []}))
    assert found[2] == f"! -p tcp,udp {QUEUE}"
    assert text(config_of([SHOP], None, {"protocol": ["icmp"], "tcp_ports": []})) == [f"-p 1 {QUEUE}"]


def test_other_hooks_and_tables_are_left_to_the_queue() -> None:
    config = config_of([WEB, SHOP], selected={"hooks": ["output", "input"]})
    assert text(config, hook="INPUT") == [QUEUE]
    (raw,) = plan(config_of([SHOP], elements=["allow"], selected={"table": "raw"}), 972, lists=True)["inet"].values()
    assert [rule.tag.rpartition(":")[2] for rule in raw.chains["NFQA-default-OUTPUT"][1:-1]] == ["app"]
    by_owner = plan(config_of([SHOP], selected={"uid": [7]}), 972, lists=True)["inet"]["mangle"]
    assert not any(".allow." in rule.tag for rule in by_owner.rules)
    assert not any(".allow." in rule.tag for rule in plan(config_of([SHOP]), 972, lists=False)["inet"]["mangle"].rules)


def test_groups_that_no_rule_means_change_no_rule() -> None:
    config = config_of([WEB, SHOP], None)
    more = [(8, "/user.slice"), (9, "/user.slice/user-0.slice"), (10, "/a/b/c/d/e/f")]
    assert text(config, [*TREE, *more]) == text(config)
    # One level below those that are meant any group is another one.
    assert next(line for line in text(config) if line.endswith(QUEUE) and "level" in line).startswith("-m group --level 4 ")


def test_without_groups_everything_goes_to_the_queue() -> None:
    assert text(config_of([WEB, SHOP]), ()) == [*HEAD, QUEUE]


@pytest.mark.parametrize(
    ("rules", "options", "found"),
    [
        ([WEB, SHOP], {}, ["rule 1", "rule 2", "default"]),
        ([WEB, SHOP], {"elements": ["allow"]}, ["rule 2", "default"]),
        ([WEB, SHOP], {"mode": "monitor"}, ["rule 1"]),
        ([WEB, SHOP], {"compile": "off"}, None),
        ([WEB, SHOP], {"elements": ["allow", "log"]}, None),
        ([WEB, SHOP], {"elements": ["allow", "log", "offload"], "compile": "first"}, ["rule 1", "rule 2", "default"]),
        ([WEB, SHOP], {"elements": ["allow", "chaos"]}, None),
        ([WEB, {"action": "drop", "tls_sni": ["a.test"]}], {}, None),
        ([{"action": "drop", "dport": [25]}], {}, None),
        ([{"action": "reject", "unit": "a.service"}, {**SHOP, "name": "shop"}], {}, ["rule 2 (shop)", "default"]),
        ([SHOP, {"action": "drop", "interface": ["?o"]}, SHOP], {}, ["rule 1"]),
        ([SHOP], {"default": None, "elements": ["allow", "rate-limit"]}, None),
        ([SHOP], {"default": None, "elements": ["allow"]}, ["rule 1"]),
    ],
)
def test_what_is_compiled(rules: list[dict[str, Any]], options: dict[str, Any], found: list[str] | None) -> None:
    default = options.get("default", "drop")
    config = config_of(rules, default, **{key: value for key, value in options.items() if key != "default"})
    policy = owner_policy(config, config.queue["main"])
    assert (None if policy is None else [each.label for each in policy.decided]) == found


def test_a_queue_that_drops_what_no_rule_matches_is_asked() -> None:
    made = Config.model_validate({
        "agent": {"backend": "owned"},
        "queue": {"main": {"compile": "auto", "elements": ["allow"], "default": "drop"}},
        "element": {"allow": {"type": "policy", "rule": [SHOP]}},
    })  # fmt: skip
    assert owner_policy(made, made.queue["main"]) is None


def test_many_rules_are_asked_up_to_a_number() -> None:
    rules = [{"action": "drop", "cgroup": "/system.slice", "dport": [port]} for port in range(1, MOST + 10)]
    asked = [line for line in text(config_of(rules, None)) if "DROP" in line]
    assert len(asked) == MOST


def test_the_names_of_the_rules_are_those_of_the_policy() -> None:
    assert reasons(config_of([WEB, {**SHOP, "name": "shop"}])) == {
        "app.allow.1": ("main", "allow", "rule 1"), "app.allow.2": ("main", "allow", "rule 2 (shop)"),
        "app.allow.default": ("main", "allow", "default"),
    }  # fmt: skip


def test_which_groups_meet_a_condition() -> None:
    tree = GroupTree(TREE)
    assert tree.members(2, condition([("unit", ["web*"])])) == "3"
    assert tree.members(3, condition([("unit", ["web*"])])) == "4"
    assert tree.members(2, condition([("cgroup", ["*/web.service"])])) == "3"
    assert tree.members(3, condition([("cgroup", ["*/web.service"])])) == ""
    assert tree.members(2, condition(())) == "3,5"
    deep = GroupTree([(1, "/"), (9, "/" + "/".join("abcdefghijkl"))])
    assert not any(deep.members(level, condition(())) for level in range(1, DEEPEST + 1))
    assert GroupTree((number, f"/{number}") for number in range(20_000)).numbers == {}


def test_groups_are_looked_for_once_a_second_and_only_for_rules_that_ask() -> None:
    now, groups, walks = [100.0], list(TREE), [0]

    def walk() -> list[tuple[int, str]]:
        walks[0] += 1
        return list(groups)

    watch = GroupWalk(walk, lambda: now[0])
    asks, asks_not = (plan(config_of(rules), 972, lists=True) for rules in ([WEB], [{"action": "drop", "dport": [25]}]))
    assert watch.now(asks_not) == GroupTree()
    assert watch.changed(asks_not) is None
    assert walks == [0]
    watch.known = watch.now(asks)
    groups.append((7, "/new.service"))
    assert watch.changed(asks) is None
    now[0] += 1.1
    found = watch.changed(asks)
    assert found is not None
    assert found.numbers["/new.service"] == 7
    watch.known = found
    now[0] += 1.1
    assert watch.changed(asks) is None
    assert walks == [3]
