"""Rules in a table that belongs to a process: who can change it, when it goes, how it is handed over, what it reads like."""

from __future__ import annotations

import os
import re
import sys
import time
from typing import Any

import pytest
from agent import until
from cost import assert_cost_below
from namespace import Namespace
from owned_table import OTHERS, listed, send
from resident import Resident
from rule_texts import jump, rules
from tcp_client import ask, server

from nfq_agent.config.models import Config
from nfq_agent.host.attributes import attribute, attributes
from nfq_agent.host.nftables import sets
from nfq_agent.host.nftables.expressions import encode
from nfq_agent.host.nftables.owned import OwnedHost
from nfq_agent.host.nftables.support import probe
from nfq_agent.rules.diff import diff
from nfq_agent.rules.leaving import fail_closed
from nfq_agent.rules.model import FAMILIES, Rule, RuleError, Ruleset
from nfq_agent.rules.plan import plan

pytestmark = pytest.mark.kernel


UID = 972


def config_of(**tables: Any) -> Config:
    return Config.model_validate({"queue": {"main": {"num": 100}}, **tables})


def desired(config: Config) -> Ruleset:
    return plan(config, UID, lists=True)


BASELINE = config_of(rules={"app": {"queue": "main", "tcp_ports": [11000]}})

CLOSED = config_of(
    queue={"main": {"num": 100, "bypass": False}}, rules={"app": {"queue": "main", "udp_ports": [53], "hooks": ["output"]}}
)


def applied(state: dict[str, Any], ruleset: Ruleset, inherited: int | None = None) -> dict[str, str]:
    host = state.setdefault("host", OwnedHost("default", inherited=inherited))
    done = host.apply_all({family: ruleset.get(family, {}) for family in FAMILIES})
    return {family: str(applied.changes) for family, applied in done.items() if applied.changes}


def closed(state: dict[str, Any]) -> None:
    state.pop("host").close()


def state_of(netns: Namespace) -> dict[str, Any]:
    return {family: netns.call(OwnedHost("default").read, family) for family in FAMILIES}


def holds(netns: Namespace, ruleset: Ruleset) -> bool:
    found = state_of(netns)
    return not any(diff(ruleset.get(family, {}), found[family]) for family in FAMILIES)


def test_the_table_as_nft_lists_it(netns: Namespace, resident: Resident) -> None:
    resident.call(applied, desired(BASELINE))
    text = re.sub(r" # progname .*", "", listed(netns))
    assert (
        text[: text.index("table ip6")]
        == """table ip nfq-agent-default {
	flags owner

	set tcp-app {
		type inet_service
		flags interval
		elements = { 11000 }
	}

	chain mangle-NFQA-default-INPUT {
		tcp dport @tcp-app counter packets 0 bytes 0 queue num 100 bypass comment "nfq-agent:default:app"
		tcp sport @tcp-app counter packets 0 bytes 0 queue num 100 bypass comment "nfq-agent:default:app"
		counter packets 0 bytes 0 return comment "nfq-agent:default:end"
	}

	chain mangle-NFQA-default-OUTPUT {
		meta skuid 972 counter packets 0 bytes 0 return comment "nfq-agent:default:own-traffic"
		tcp dport @tcp-app counter packets 0 bytes 0 queue num 100 bypass comment "nfq-agent:default:app"
		tcp sport @tcp-app counter packets 0 bytes 0 queue num 100 bypass comment "nfq-agent:default:app"
		counter packets 0 bytes 0 return comment "nfq-agent:default:end"
	}

	chain mangle-INPUT {
		type filter hook input priority mangle; policy accept;
		counter packets 0 bytes 0 jump mangle-NFQA-default-INPUT comment "nfq-agent:default:jump"
	}

	chain mangle-OUTPUT {
		type route hook output priority mangle; policy accept;
		counter packets 0 bytes 0 jump mangle-NFQA-default-OUTPUT comment "nfq-agent:default:jump"
	}
}
"""
    )


def test_no_other_process_can_change_it_and_a_kill_removes_it(netns: Namespace, resident: Resident) -> None:
    resident.call(applied, desired(BASELINE))
    before = listed(netns)
    for refused in ("delete table ip nfq-agent-default", "flush table ip nfq-agent-default"):
        assert "Operation not permitted" in netns.run("nft", *refused.split(), check=False).stderr
    netns.run("nft", "flush", "ruleset")
    netns.run("iptables-nft", "-F")
    assert "table ip nfq-agent-default" in listed(netns)
    assert holds(netns, desired(BASELINE))
    assert before.count("NFQA") <= listed(netns).count("NFQA")
    with pytest.raises(RuleError, match=r"belongs to another running process \(netlink port \d+\); stop that process first"):
        netns.call(OwnedHost("default").apply_all, desired(CLOSED))
    assert holds(netns, desired(BASELINE))
    resident.kill()
    until(lambda: "nfq-agent" not in listed(netns), "the table goes with its owner")


def fork_successor(state: dict[str, Any], ruleset: Ruleset) -> int:
    """A process that is given the descriptor, waits for its predecessor's death, changes the rules, and lives on."""
    (descriptor,) = state["host"].descriptors
    predecessor = os.getpid()
    child = os.fork()
    if child:
        return child
    try:
        successor: dict[str, Any] = {}
        while os.getppid() == predecessor:
            time.sleep(0.01)
        assert applied(successor, {**ruleset}, descriptor)
        time.sleep(60)
    finally:
        os._exit(1)


def test_a_process_that_gets_the_socket_has_the_rules(netns: Namespace, resident: Resident) -> None:
    resident.call(applied, desired(BASELINE))
    more = config_of(rules={"app": {"queue": "main", "tcp_ports": [11000, 12000]}})
    successor = resident.call(fork_successor, desired(more))
    resident.kill()
    until(lambda: holds(netns, desired(more)), "the successor changes the rules")
    os.kill(successor, 9)
    until(lambda: "nfq-agent" not in listed(netns), "the table goes with its last holder")


def test_what_fails_closed_outlives_its_owner_and_is_taken_up(netns: Namespace, resident: Resident) -> None:
    if not netns.call(probe).persist:
        pytest.skip("Linux 6.9 has tables that outlive their owner")
    resident.call(applied, desired(CLOSED))
    assert "flags owner,persist" in listed(netns) or "table ip nfq-agent-default.closed" in listed(netns)
    resident.kill()
    assert holds(netns, desired(CLOSED))
    # No process owns it now, so that any process can change it; the next start mends that and owns it.
    netns.run(
        "nft", "insert", "rule", "ip", "nfq-agent-default.closed", "mangle-NFQA-default-OUTPUT", "udp", "dport", "53", "accept"
    )
    netns.run("nft", "delete", "element", "ip6", "nfq-agent-default.closed", "udp-app", "{ 53 }")
    assert not holds(netns, desired(CLOSED))
    second = Resident(netns)
    try:
        second.call(applied, desired(CLOSED))
        assert holds(netns, desired(CLOSED))
        assert "not permitted" in netns.run("nft", "delete", "table", "ip", "nfq-agent-default.closed", check=False).stderr
        # It is taken over unchanged, and is owned too.
        assert second.call(applied, desired(CLOSED)) == {}
        # A clean stop takes all of it away.
        second.call(applied, {})
        second.call(closed)
    finally:
        second.kill()
    assert "nfq-agent" not in listed(netns)


def test_an_orphan_with_the_right_rules_is_owned_again(netns: Namespace, resident: Resident) -> None:
    resident.call(applied, desired(CLOSED))
    resident.kill()
    second = Resident(netns)
    try:
        assert second.call(applied, desired(CLOSED)) == {}
        assert "not permitted" in netns.run("nft", "delete", "table", "ip", "nfq-agent-default.closed", check=False).stderr
    finally:
        second.kill()


def test_after_a_failure_only_what_fails_closed_stays(netns: Namespace, resident: Resident) -> None:
    both = config_of(
        queue={"main": {"num": 100, "bypass": False}, "open": {"num": 101}},
        rules={"shut": {"queue": "main", "udp_ports": [53]}, "open": {"queue": "open", "tcp_ports": [80]}},
    )
    resident.call(applied, desired(both))
    resident.kill()

    def remove_after_failure() -> None:
        host = OwnedHost("default")
        host.apply_all({family: fail_closed(host.read(family)) for family in FAMILIES}, undo=False)
        host.close()

    netns.call(remove_after_failure)
    text = listed(netns)
    assert "udp-shut" in text
    assert "tcp-open" not in text

    def remove() -> None:
        host = OwnedHost("default")
        host.apply_all({family: {} for family in FAMILIES})
        host.close()

    netns.call(remove)
    assert "nfq-agent" not in listed(netns)


def test_a_change_of_bypass_moves_the_rules(netns: Namespace, resident: Resident) -> None:
    resident.call(applied, desired(BASELINE))
    resident.call(applied, desired(CLOSED))
    assert holds(netns, desired(CLOSED))
    resident.call(applied, desired(BASELINE))
    assert holds(netns, desired(BASELINE))
    resident.call(applied, {})
    resident.call(closed)
    assert "nfq-agent" not in listed(netns)


def counted(netns: Namespace, rule: str) -> int:
    chains = state_of(netns)["inet"]["mangle"].chains
    return sum(each.packets for chain in chains.values() for each in chain if each.rule.tag.endswith(f":{rule}"))


def test_another_port_leaves_every_counter(netns: Namespace, resident: Resident) -> None:
    def ports(*numbers: int | str) -> Ruleset:
        rule = {"queue": "main", "udp_ports": list(numbers), "hooks": ["output"]}
        return desired(config_of(rules={"app": rule, "other": {**rule, "udp_ports": [7]}}))

    resident.call(applied, ports(9, "100:200"))
    netns.call(send, 9, 5)
    netns.call(send, 150, 2)
    netns.call(send, 7, 3)
    for change in (ports(9, "100:200", 5000), ports(9, "100:250"), ports(9, "90:300"), ports(9)):
        assert resident.call(applied, change)
        assert (counted(netns, "app"), counted(netns, "other")) == (7, 3)
    netns.call(send, 150, 1)
    netns.call(send, 9, 1)
    assert counted(netns, "app") == 8
    # A rule in front of them leaves them too.
    first = {"queue": "main", "tcp_ports": [1], "hooks": ["output"]}
    rule = {"queue": "main", "udp_ports": [9], "hooks": ["output"]}
    resident.call(applied, desired(config_of(rules={"first": first, "app": rule, "other": {**rule, "udp_ports": [7]}})))
    assert (counted(netns, "app"), counted(netns, "other")) == (8, 3)


def timed(state: dict[str, Any], ruleset: Ruleset) -> float:
    """Seconds of the processor for one change."""
    began = time.process_time()
    applied(state, ruleset)
    return time.process_time() - began


def test_ten_thousand_ports(netns: Namespace, resident: Resident) -> None:
    """No two of them side by side, in both directions of both families."""
    config = config_of(rules={"app": {"queue": "main", "tcp_ports": list(range(1, 20001, 2))}})
    ruleset = desired(config)
    hundred = desired(config_of(rules={"app": {"queue": "main", "tcp_ports": list(range(1, 201, 2))}}))

    def used(wanted: Ruleset) -> float:
        resident.call(applied, desired(config_of(rules={})))
        return resident.call(timed, wanted)

    # A hundred times as many ports cost that much more at most.
    assert_cost_below(100, lambda: used(hundred), lambda: used(ruleset))
    assert holds(netns, ruleset)
    assert resident.call(applied, ruleset) == {}


@pytest.mark.parametrize(
    "intervals", [(), ((80, 80),), ((0, 65535),), ((1, 1), (2, 2), (3, 9)), ((7, 7), (65535, 65535)), ((0, 5),)]
)
def test_the_elements_of_a_set(intervals: tuple[sets.Interval, ...]) -> None:
    made = sets.NamedSet("x", "port", intervals)
    elements = [value for message in made.element_lists(intervals) for _, value in attributes(message[4:])]
    assert sets.intervals_of((b"".join(attribute(1, value) for value in reversed(elements)),), "port") == intervals
    # Some kernels say more of each.
    more = [attribute(1, value + attribute(9, b"more")) for value in elements]
    assert sets.intervals_of(tuple(more), "port") == intervals


@pytest.mark.parametrize(
    ("options", "written"),
    [
        ("--queue-num 100 --queue-bypass", "queue num 100 bypass"),
        ("--queue-balance 3:5 --queue-bypass --queue-cpu-fanout", "queue num 3-5 bypass,fanout"),
    ],
)
def test_the_native_queue_expression_is_that_of_nft(netns: Namespace, options: str, written: str) -> None:
    """Whether the kernel has it or not: what nft sends is compared, and not whether the kernel takes it."""
    netns.shell("nft add table ip t; nft add chain ip t c")
    shown = netns.run("nft", "--debug=mnl", "add", "rule", "ip", "t", "c", *written.split(), check=False).stdout
    # The message of NFT_MSG_NEWRULE, of which each line has a header of an attribute or four bytes.
    dumped = re.sub(r"\x1b\[[0-9;]*m", "", shown).split("| 02566 |")[1].split("message length")[0]
    sent = bytearray()
    for line in dumped.splitlines():
        if header := re.match(r"\|(\d+)\|..\|(\d+)\|", line):
            sent += int(header[1]).to_bytes(2, sys.byteorder) + int(header[2]).to_bytes(2, sys.byteorder)
        elif four := re.match(r"\| ((?:[0-9a-f]{2} ){4}) *\|", line):
            sent += bytes.fromhex(four[1])
    (made,) = encode(Rule.parse(f"-A c -j NFQUEUE {options}"), "inet", str, True)
    (queue,) = [each for each in made if each.name == "queue"]
    assert queue.packed in bytes(sent)


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("first", [True, False], ids=["they come first", "we come first"])
def test_nat_of_ours_is_asked_first(netns: Namespace, resident: Resident, other: str, first: bool) -> None:
    ours = rules(
        f"nat {jump('default', 'OUTPUT')}",
        "nat -A NFQA-default-OUTPUT -p tcp -m multiport --dports 8080 "
        '-m comment --comment "nfq-agent:default:r" -j REDIRECT --to-ports 9000',
    )
    server(netns, "who", "127.0.0.1", 9000)
    for here in (first, not first):
        if here:
            netns.shell(OTHERS[other])
        else:
            resident.call(applied, {"inet": ours})
    assert netns.call(ask, "127.0.0.1", 8080, b"").startswith(b"127.0.0.1 ")
