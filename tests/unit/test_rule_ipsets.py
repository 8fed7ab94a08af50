"""Rules by an ipset, in the family of the set's addresses."""

from __future__ import annotations

import pytest

from nfq_agent.host import ipsets as host_ipsets
from nfq_agent.host.ipsets import IpSet
from nfq_agent.rules.ipsets import fitted, names, refuse_fewer_directions
from nfq_agent.rules.model import FAMILIES, Rule, RuleError, Ruleset, TableRules

TAG = '-m comment --comment "nfq-agent:default:app"'
QUEUE = "-j NFQUEUE --queue-num 1 --queue-bypass"


def ruleset(*rules: str) -> Ruleset:
    """Rules of the hook OUTPUT, the same in both families."""
    table = TableRules({"C": tuple(Rule.parse(f"-A C {each}") for each in rules)})
    return {family: {"mangle": table} for family in FAMILIES}


def texts(rules: Ruleset) -> dict[str, list[str]]:
    return {family: [each.spec for each in tables["mangle"].rules] for family, tables in rules.items()}


def test_a_rule_is_made_for_the_family_of_its_set() -> None:
    planned = ruleset(f"-p udp -m set --match-set a dst {TAG} {QUEUE}", f"-p tcp {TAG} {QUEUE}")
    assert names(planned) == {"a": ["app"]}
    both = texts(planned)["inet"]
    assert texts(fitted(planned, {"a": "inet"})) == {"inet": both, "inet6": both[1:]}
    assert texts(fitted(planned, {"a": None})) == {"inet": both, "inet6": both}


def test_no_packet_of_the_other_family_is_in_an_excluded_set() -> None:
    planned = ruleset(f"-p udp -m set ! --match-set a dst {TAG} {QUEUE}")
    found = texts(fitted(planned, {"a": "inet6"}))
    assert found == {"inet": [f"-p udp {TAG} {QUEUE}"], "inet6": texts(planned)["inet6"]}


def test_a_rule_for_the_other_family_alone_is_refused() -> None:
    planned = ruleset(f"-p udp -m set --match-set a dst {TAG} {QUEUE}")
    with pytest.raises(RuleError, match=r'rules.app takes packets by the ipset a, which holds IPv6 .*set family = "inet6"'):
        fitted({"inet": planned["inet"]}, {"a": "inet6"})


def test_a_rule_that_looks_up_too_little_is_refused() -> None:
    planned = ruleset(f"-p udp -m set --match-set a src {TAG} {QUEUE}")
    refuse_fewer_directions(planned, "a", "hash:net", 1)
    with pytest.raises(RuleError, match=r'of type hash:ip,port,ip: .* 3 directions, as in set = "a src,src,src"'):
        refuse_fewer_directions(planned, "a", "hash:ip,port,ip", 3)


def test_rules_without_a_set_ask_the_kernel_nothing() -> None:
    planned = ruleset(f"-p udp {TAG} {QUEUE}")
    assert host_ipsets.fitted(planned) is planned
    assert IpSet(3, "inet", "hash:ip,port").dimensions == 2
