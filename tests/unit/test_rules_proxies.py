"""The rules that accept what is redirected to a proxy, in the text of iptables."""

from __future__ import annotations

from typing import Any

import pytest
from planned import UID, config_of

from nfq_agent.config.models import Config
from nfq_agent.host.nftables import accepting
from nfq_agent.host.nftables.layout import user_data
from nfq_agent.rules.diff import diff
from nfq_agent.rules.leaving import keep_for_draining, merged
from nfq_agent.rules.model import Rule, TableState
from nfq_agent.rules.plan import plan
from nfq_agent.rules.proxies import accept_rules

TAG = '-m comment --comment "nfq-agent:default:accept.web"'
BY_PORT = f"-A INPUT -p tcp -m tcp --dport {{port}} -m conntrack --ctstate DNAT {TAG} -j ACCEPT"
BY_MARK = f"-A INPUT -p tcp -m mark --mark 0x800/0x800 {TAG} -j ACCEPT"


def config(accept: bool = True, **proxy: Any) -> Config:
    listen = ["0.0.0.0:15002", "0.0.0.0:15006", "[::]:15003"]
    rules = {
        "web": {"proxy": "web", "tcp_ports": [80], "hooks": ["prerouting"]},
        "more": {"proxy": "web", "tcp_ports": [81], "hooks": ["prerouting"], "port": 15006, "family": "inet"},
    }
    return config_of(proxy={"web": {"listen": listen, "accept_input": accept, **proxy}}, rules=rules)


def texts(config: Config, *families: Any) -> dict[str, list[str]]:
    found = accept_rules(config, families) if families else accept_rules(config)
    return {family: [str(rule) for rule in rules] for family, rules in found.items()}


def test_each_listener_that_rules_lead_to() -> None:
    assert texts(config()) == {
        "inet": [BY_PORT.format(port=15002), BY_PORT.format(port=15006)],
        "inet6": [BY_PORT.format(port=15003)],
    }
    assert list(texts(config(), "inet")) == ["inet"]
    assert texts(config(accept=False)) == {}


def test_by_tproxy_one_rule_is_enough() -> None:
    assert texts(config(capture="tproxy")) == {"inet": [BY_MARK], "inet6": [BY_MARK]}


def test_legacy_tables_have_them_in_the_chain_that_is_there() -> None:
    ruleset = plan(config(), UID)
    assert [str(rule) for rule in ruleset["inet6"]["filter"].jumps] == [BY_PORT.format(port=15003)]
    assert ruleset["inet6"]["filter"].chains == {}
    # A table of our own accepts nothing for others.
    assert "filter" not in plan(config(), UID, lists=True)["inet"]
    # Connections that run need them to the end; and nothing is there twice when both configurations have them.
    kept = keep_for_draining(ruleset)
    assert kept["inet"]["filter"] == ruleset["inet"]["filter"]
    assert merged(ruleset, kept)["inet"]["filter"] == ruleset["inet"]["filter"]


@pytest.mark.parametrize("place", [("ip", "filter", "INPUT"), ("ip6", "filter", "INPUT"), ("inet", "theirs", "in")])
@pytest.mark.parametrize("capture", ["redirect", "tproxy"])
def test_what_is_written_into_a_chain_of_others_is_read_back(place: tuple[str, str, str], capture: str) -> None:
    family, table, chain = place
    (rule,) = {Rule.parse(each.replace("INPUT", chain)) for each in texts(config(capture=capture))["inet"][:1]}
    expressions = accepting.expressions_of(family, table, rule)
    data = user_data(rule, 0)
    assert accepting.verified(family, table, chain, data, expressions) == rule
    # Changed by others, it does not belong to the configuration, and is still known as ours.
    other = accepting.verified(family, table, chain, data, expressions[1:])
    assert other != rule
    assert other.tag == rule.tag
    assert [each.name for each in expressions].count("match") == (0 if table == "theirs" else 1 if capture == "tproxy" else 2)


def test_a_place_that_drops_nothing_wants_none() -> None:
    assert accepting.AcceptRules("default").accepting({}) == {}
    assert diff({}, {"ip filter": TableState()}) == {}
