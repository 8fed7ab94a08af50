"""The leading rules of a policy as rules of the kernel in front of the queue: which, and as what."""

from __future__ import annotations

import re
from typing import Any

import pytest

from nfq_agent.config.models import Config
from nfq_agent.rules.kernel_policy import NOT_RECORDED, kernel_rules, reasons
from nfq_agent.rules.model import FAMILIES, Family, Installed
from nfq_agent.rules.plan import plan
from nfq_agent.service.live_rules import ListedRule
from nfq_agent.service.report import with_kernel
from nfq_agent.service.status import DecisionStatus, QueueStatus


def config_of(
    rules: list[dict[str, Any]], selected: dict[str, Any] | None = None, default: str | None = "accept", **queue: Any
) -> Config:
    element: dict[str, Any] = {"type": "policy", "rule": rules} | ({} if default is None else {"default": default})
    return Config.model_validate({
        "agent": {"backend": "owned"},
        "queue": {"main": {"num": 100, "compile": "auto", "elements": ["allow"], "log_drops": False, **queue}},
        "element": {"allow": element},
        "rules": {"app": {"queue": "main", "hooks": ["output"], "all": True, **(selected or {})}},
    })  # fmt: skip


def text(config: Config, family: Family = "inet") -> list[str]:
    """The rules in front of the jump to the queue's chain, and those of that chain, without its first and its last."""
    table = plan(config, 972, lists=True)[family]["mangle"]
    *passing, jump = (rule for rule in table.jumps if rule.chain == "OUTPUT")
    assert jump.tag == "nfq-agent:default:jump"
    chain = table.chains[jump.target.name]
    return [re.sub('-m comment --comment "nfq-agent:default:(.*)"', r"# \1", rule.spec) for rule in (*passing, *chain[1:-1])]


LIST: list[dict[str, Any]] = [
    {"action": "accept", "dst": ["10.0.0.0/8", "fd00::/8"], "dport": ["80:443"], "protocol": ["tcp"]},
    {"action": "drop", "name": "dns", "dport": [53], "src": ["192.0.2.0/24"]},
]


def test_rules_stand_in_front_of_the_queue() -> None:
    last = ["# app.allow.default -j RETURN", "# app -j NFQUEUE --queue-num 100 --queue-bypass"]
    assert text(config_of(LIST)) == [
        "-p tcp -m range --dst-range 10.0.0.0-10.255.255.255 -m port --dports 80:443 # app.allow.1 -j RETURN",
        *(
            f"-p {protocol} -m range --src-range 192.0.2.0-192.0.2.255 -m port --dports 53 # app.allow.2 -j DROP"
            for protocol in ("tcp", "udp", "33", "132", "136")
        ),
        *last,
    ]
    # A rule that names no network of a family meets none of its packets.
    first, *others = text(config_of(LIST), "inet6")
    assert first.startswith("-p tcp -m iprange --dst-range fd00::-fdff:")
    assert others == last


def test_rules_on_users_stand_behind_the_answers_to_connections() -> None:
    config = config_of([{"action": "accept", "uid": [0, 7], "gid": [9]}], {"hooks": ["output", "input"]})
    assert text(config) == [
        "-p tcp -m tcp --tcp-flags SYN,ACK SYN,ACK # app -j NFQUEUE --queue-num 100 --queue-bypass",
        "-m owner --uid-owner 0 -m owner --gid-owner 9 # app.allow.1 -j RETURN",
        "-m owner --uid-owner 7 -m owner --gid-owner 9 # app.allow.1 -j RETURN",
        "# app.allow.default -j RETURN",
        "# app -j NFQUEUE --queue-num 100 --queue-bypass",
    ]
    # What comes in has no user that the worker is told of: all rules from this one on are asked there.
    inward = plan(config, 972, lists=True)["inet"]["mangle"].chains["NFQA-default-INPUT"]
    assert [rule.tag for rule in inward] == ["nfq-agent:default:app", "nfq-agent:default:end"]
    # No packet of UDP is such an answer.
    udp = text(config_of([{"action": "accept", "uid": [0]}], {"all": False, "udp_ports": [53]}))
    assert not any("tcp" in line for line in udp)


def test_what_is_dropped_goes_to_the_queue_at_the_rate_of_the_log() -> None:
    rules = [{"action": "drop", "protocol": ["udp"]}, {"action": "accept", "protocol": ["tcp"]}]
    assert text(config_of(rules, default=None, log_drops=True)) == [
        "-p udp -m limit --limit 100/sec --limit-burst 100 # app -j NFQUEUE --queue-num 100 --queue-bypass",
        "-p udp # app.allow.1 -j DROP",
        "-p tcp # app.allow.2 -j RETURN",
        "# app -j NFQUEUE --queue-num 100 --queue-bypass",
    ]


FIRST = "-m conntrack --ctstate NEW"
RATE = "-m limit --limit 100/sec --limit-burst 100 # app -j NFQUEUE --queue-num 100 --queue-bypass"


def test_first_packets_of_flows_go_to_the_queue_at_a_rate_and_others_are_counted() -> None:
    rules = [{"action": "accept", "protocol": ["tcp"]}, {"action": "drop", "protocol": ["udp"]}]
    assert text(config_of(rules, None, "drop", compile="first", elements=["allow", "record"])) == [
        f"-p tcp {FIRST} {RATE}", f"-p tcp {FIRST} # app.allow.unrecorded", "-p tcp # app.allow.1 -j RETURN",
        f"-p udp {FIRST} {RATE}", f"-p udp {FIRST} # app.allow.unrecorded", "-p udp # app.allow.2 -j DROP",
        f"{FIRST} {RATE}", f"{FIRST} # app.allow.unrecorded", "# app.allow.default -j DROP",
        "# app -j NFQUEUE --queue-num 100 --queue-bypass",
    ]  # fmt: skip
    # A line for a drop is due whatever connection tracking says of the packet.
    assert text(config_of(rules[1:], None, None, compile="first", log_drops=True))[0] == f"-p udp {RATE}"


def test_first_packets_are_looked_up_beside_a_map() -> None:
    rules = [{"action": action, "dst": [f"10.{number}.0.0/16"]} for number, action in enumerate(["accept", "drop"] * 4)]
    first, counting, of_map, *_ = text(config_of(rules, compile="first", elements=["allow", "log"]))
    assert first.startswith(f"{FIRST} -m entries --of dst,protocol --list 10.0.0.0-10.0.255.255/0-255,10.1.")
    assert first.endswith(RATE)
    assert counting.startswith(f"{FIRST} -m entries --of dst,protocol --list ")
    assert counting.endswith("# app.allow.unrecorded")
    assert "--map" in of_map


def test_what_is_not_recorded_has_a_count_of_its_own() -> None:
    config = config_of(LIST, compile="first", elements=["allow", "record"])
    assert reasons(config)["app.allow.unrecorded"] == ("main", "allow", NOT_RECORDED)
    assert NOT_RECORDED not in {label for _, _, label in reasons(config_of(LIST)).values()}


def test_many_rules_of_one_shape_are_a_map() -> None:
    rules = [{"action": "drop", "dst": [f"10.{number}.0.0/16"], "dport": [80], "protocol": ["tcp"]} for number in range(8)]
    (outside, of_map, default, _) = text(config_of([*rules], {"all": False, "tcp_ports": [80]}))
    assert outside == "-p tcp -m port --ports 80 -m range ! --dst-range 10.0.0.0-10.7.255.255 # app.allow.default -j RETURN"
    assert of_map.startswith("-p tcp -m port --ports 80 # app.allow.1-8 -j VERDICTS --of dst,protocol,dport --map 10.0.0.0-10.0.")
    assert of_map.count("=drop.") == 8
    assert "app.allow.default" in default
    # None of them is of this family.
    assert len(text(config_of([*rules], {"all": False, "tcp_ports": [80]}), "inet6")) == 2
    sampled, of_map, *_ = text(config_of(rules, None, None, log_drops=True))
    assert sampled.endswith("-m limit --limit 100/sec --limit-burst 100 # app -j NFQUEUE --queue-num 100 --queue-bypass")
    assert sampled.startswith("-m entries --of dst,protocol,dport --list 10.0.0.0-10.0.255.255/6/80,10.1.")
    # The one in the middle meets packets of others.
    cut = text(config_of([*rules, {**rules[0], "dst": ["10.0.0.0/8"]}, *rules]))
    assert [line.split("app.allow.")[1].split()[0] for line in cut[:-1]] == ["1-8", "9", "default", "10-17", "default"]


def test_what_passes_a_map_is_looked_up_once_where_drops_are_logged() -> None:
    rules: list[dict[str, Any]] = [
        {"action": "drop", "dst": [f"10.{number}.0.0/16"], "dport": [80], "protocol": ["tcp"]} for number in range(8)
    ]
    of = "-m entries --of dst,protocol,dport"
    on_ports = config_of(rules, {"all": False, "tcp_ports": [80]}, log_drops=True)
    _, passing, sampled, of_map, *others = text(on_ports)
    assert passing.startswith(f"-p tcp -m port --ports 80 {of} ! --list 10.0.0.0-10.0.255.255/6/80,10.1.")
    assert passing.endswith("/6/80 # app.allow.default -j RETURN")
    # Nothing but what is dropped gets there.
    assert sampled == f"-p tcp -m port --ports 80 {RATE}"
    assert of_map.startswith("-p tcp -m port --ports 80 # app.allow.1-8 -j VERDICTS ")
    # One that is too short for ports is in no list, and in no map.
    assert others[0] == "-p tcp -m port --ports 80 # app.allow.default -j RETURN"
    # Where all is selected, one that is too short for ports is not dropped.
    outside, passing, sampled, *_ = text(config_of(rules, log_drops=True))
    assert outside == "-m port ! --dports 80 # app.allow.default -j RETURN"
    assert passing.startswith(f"{of} ! --list 10.0.")
    assert sampled.startswith(f"{of} --list 10.0.")
    # What some entries accept must not be taken for what is dropped.
    _, passing, sampled, *_ = text(config_of([*rules, {**rules[0], "action": "accept", "dst": ["10.9.0.0/16"]}], log_drops=True))
    assert "10.9.0.0" in passing
    assert "10.9.0.0" not in sampled
    # Another rule, or nothing, between the map and the default.
    for more, default in (({"action": "drop", "sport": [7]}, "accept"), (None, None), (None, "drop")):
        several = [*rules, *([] if more is None else [more])]
        assert not any(" ! " in line for line in text(config_of(several, None, default, log_drops=True)))


def test_what_no_entry_of_a_map_can_meet_passes_before_it_where_that_is_most() -> None:
    def outside(*networks: str, family: Family = "inet", **more: Any) -> str:
        rules = [{"action": "drop", "dst": [each], **more} for each in networks]
        (found,) = [line for line in text(config_of(rules), family) if " ! " in line] or [""]
        return found.partition(" # ")[0]

    assert outside(*(f"10.{number}.0.0/16" for number in range(9))) == "-m range ! --dst-range 10.0.0.0-10.8.255.255"
    assert outside(*(f"{number}.0.0.0/8" for number in range(9))) == "-m range ! --dst-range 0.0.0.0-8.255.255.255"
    assert outside(*(f"{number}.0.0.0/8" for number in range(0, 180, 20))) == ""
    assert outside(*(f"{number}.0.0.0/8" for number in range(0, 180, 20)), dport=["80:90"]) == "-m port ! --dports 80:90"
    v6 = [f"fd00:{number:x}::/32" for number in range(9)]
    assert outside(*v6, family="inet6") == "-m range ! --dst-range fd00::-fd00:8:ffff:ffff:ffff:ffff:ffff:ffff"
    # What has no entry does not pass.
    dropped = [{"action": "accept", "dst": [each]} for each in v6]
    assert not any(" ! " in line for line in text(config_of(dropped, None, "drop"), "inet6"))


def test_what_passes_takes_no_jump_and_is_not_asked_for_its_user() -> None:
    rules: list[dict[str, Any]] = [{"action": "drop", "dst": [f"10.{number}.0.0/16"]} for number in range(8)]
    config = config_of(rules, {"hooks": ["output", "input"]}, log_drops=True)
    table = plan(config, 972, lists=True)["inet"]["mangle"]
    assert [(rule.chain, rule.target.name) for rule in table.jumps] == [
        ("INPUT", "RETURN"), ("INPUT", "RETURN"), ("INPUT", "NFQA-default-INPUT"),
        ("OUTPUT", "RETURN"), ("OUTPUT", "RETURN"), ("OUTPUT", "NFQA-default-OUTPUT"),
    ]  # fmt: skip
    # What is dropped is asked.
    assert [rule.tag.rpartition(":")[2] for rule in table.chains["NFQA-default-OUTPUT"]] == [
        "own-traffic", "app", "app.allow.1-8", "app.allow.default", "app", "end",
    ]  # fmt: skip
    # Behind a rule that drops, and where a proxy's own connections would be counted, they stay.
    several = config_of([{"action": "drop", "uid": [7]}, *rules], log_drops=True)
    assert len(plan(several, 972, lists=True)["inet"]["mangle"].jumps) == 1
    proxied = Config.model_validate({
        "proxy": {"web": {"listen": ["127.0.0.1:15080"]}},
        "rules": {"web": {"proxy": "web", "hooks": ["output"], "tcp_ports": [80]}},
    })  # fmt: skip
    both = config.model_copy(update={"proxy": proxied.proxy, "rules": {**config.rules, **proxied.rules}})
    assert len(plan(both, 972, lists=True)["inet"]["mangle"].jumps) == 2


def test_the_names_of_the_rules_are_those_of_the_policy() -> None:
    assert reasons(config_of(LIST)) == {
        "app.allow.1": ("main", "allow", "rule 1"),
        "app.allow.2": ("main", "allow", "rule 2 (dns)"),
        "app.allow.default": ("main", "allow", "default"),
    }


@pytest.mark.parametrize(
    ("rules", "options", "found"),
    [
        (LIST, {}, ["rule 1", "rule 2 (dns)", "default"]),
        (LIST, {"default": None}, ["rule 1", "rule 2 (dns)"]),
        (LIST, {"mode": "monitor"}, ["rule 1"]),
        (LIST, {"log_drops": True}, ["rule 1", "rule 2 (dns)", "default"]),
        (LIST, {"compile": "off"}, []),
        (LIST, {"elements": ["allow", "log"]}, []),
        (LIST, {"elements": ["log", "allow"]}, []),
        (LIST, {"elements": ["allow", "chaos"]}, []),
        (LIST, {"elements": ["allow", "log"], "compile": "first"}, ["rule 1", "rule 2 (dns)", "default"]),
        (LIST, {"elements": ["allow", "record"], "compile": "first"}, ["rule 1", "rule 2 (dns)", "default"]),
        (LIST, {"elements": ["allow", "chaos"], "compile": "first"}, []),
        (LIST, {"elements": []}, []),
        ([LIST[0], {"action": "drop", "uid": [0]}, LIST[1]], {}, ["rule 1", "rule 2", "rule 3 (dns)", "default"]),
        ([LIST[0], {"action": "drop", "interface": ["?o"]}, LIST[1]], {}, ["rule 1"]),
        ([LIST[0], {"action": "reject", "dport": [22]}], {}, ["rule 1"]),
        ([*LIST, {"action": "drop", "tls_sni": ["a.test"]}], {"elements": ["allow"]}, []),
        (
            [{"action": "accept", "dport": [port]} for port in range(1, 5000)],
            {},
            [f"rule {number}" for number in range(1, 4097)],
        ),
    ],
)
def test_what_is_compiled(rules: list[dict[str, Any]], options: dict[str, Any], found: list[str]) -> None:
    config = config_of(rules, **options)
    assert [each.label for each in kernel_rules(config, config.queue["main"])[1]] == found


def test_the_other_backend_has_no_such_rules() -> None:
    rules = plan(config_of(LIST), 972, lists=False)["inet"]["mangle"].chains["NFQA-default-OUTPUT"]
    assert [rule.tag for rule in rules] == ["nfq-agent:default:app"]


@pytest.mark.parametrize(
    ("rule", "selected", "tags"),
    [
        ({"protocol": ["udp"]}, {"all": True}, ["-p udp"]),
        ({"protocol": ["udp"]}, {"all": False, "tcp_ports": [80]}, []),
        ({"protocol": ["icmp", "tcp"]}, {"not_tcp_ports": [22]}, ["-p tcp", "-p 1"]),
        ({"dport": [7]}, {"all": False, "protocol": ["icmp"]}, []),
        ({"interface": ["eth0", "veth*"]}, {}, ["-o eth0", "-o veth+"]),
        ({"interface": ["eth0"]}, {"interface": ["eth0"]}, ["-o eth0"]),
        ({"interface": ["eth0"]}, {"interface": ["eth1"]}, []),
        ({"direction": "in"}, {}, []),
        ({"direction": "out"}, {}, [""]),
        ({"hook": ["input"]}, {}, []),
    ],
)
def test_how_conditions_meet_what_is_selected(rule: dict[str, Any], selected: dict[str, Any], tags: list[str]) -> None:
    config = config_of([{"action": "accept", **rule}], selected, default=None)
    written = [line for line in text(config) if "app.allow.1" in line]
    assert len(written) == len(tags)
    assert all(tag in line for tag, line in zip(tags, written, strict=True))


def test_a_closed_default_leaves_what_the_link_needs_to_the_worker() -> None:
    assert "app.allow.default" in text(config_of([], default="drop"))[0]
    assert not any("app.allow" in line for line in text(config_of([], default="drop"), "inet6"))
    assert "app.allow.default" in text(config_of([], {"all": False, "udp_ports": [53]}, default="drop"), "inet6")[0]


def test_what_a_map_counted_is_of_the_rules_in_it() -> None:
    config = config_of([{"action": "accept", "dport": [number]} for number in range(1, 11)], default=None)
    chain = plan(config, 972, lists=True)["inet"]["mangle"].chains["NFQA-default-OUTPUT"]
    rules = [
        ListedRule(
            "inet", "mangle", Installed(rule, number, 7, by_number=((3, 5), (4, 2)) if rule.target.name == "VERDICTS" else ())
        )
        for number, rule in enumerate(chain, 1)
    ]
    queue = QueueStatus("main", "enforce", True, ("allow",), None, 0, 0, 0, 0, (), ())
    (found,) = with_kernel(config, [queue], rules)
    assert {each.rule: each.in_kernel for each in found.decisions if each.in_kernel} == {"rule 3": 5, "rule 4": 2}


def test_what_the_kernel_decided_is_counted_under_the_same_rules() -> None:
    config = config_of(LIST)
    rules = [
        ListedRule(family, "mangle", Installed(rule, number, packets=number))
        for family in FAMILIES
        for number, rule in enumerate(plan(config, 972, lists=True)[family]["mangle"].chains["NFQA-default-OUTPUT"])
    ]
    counted = DecisionStatus("allow", "rule 2 (dns)", 5)
    queue = QueueStatus("main", "enforce", True, ("allow",), None, 0, 0, 0, 0, (), (counted,))
    (found,) = with_kernel(config, [queue], rules)
    # The first is in both families; rule 2 is five rules of one.
    assert found.decisions == (
        DecisionStatus("allow", "rule 2 (dns)", 5, 2 + 3 + 4 + 5 + 6),
        DecisionStatus("allow", "rule 1", 0, 1 + 1),
        DecisionStatus("allow", "default", 0, 7 + 2),
    )
