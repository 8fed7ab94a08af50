"""The tables of protocols, facts, rule keys and documentation agree."""

from __future__ import annotations

import pkgutil
import re
from importlib import import_module
from pathlib import Path

from openings import OPENINGS

import nfq_agent.protocols
from nfq_agent.facts import words
from nfq_agent.match import APPLICATIONS
from nfq_agent.policy_options import ATTRIBUTES, RuleOptions
from nfq_agent.protocols import Found, Protocol
from nfq_agent.protocols.known import BY_NAME, HEADLINES, HOSTS, OWNERS, PARSERS, PROTOCOLS

DOCS = Path(__file__).parent.parent.parent / "docs" / "dpi.md"
MODULES = [
    module.name
    for module in pkgutil.iter_modules(nfq_agent.protocols.__path__)
    if module.name not in ("http_body", "known", "quic_keys", "starttls")
]


def test_every_module_declares_one_protocol_and_is_in_the_table() -> None:
    declared = [import_module(f"nfq_agent.protocols.{name}").PROTOCOL for name in MODULES]
    assert all(isinstance(protocol, Protocol) for protocol in declared)
    assert {protocol.name for protocol in declared} == {protocol.name for protocol in PROTOCOLS}
    assert len(BY_NAME) == len(PROTOCOLS) == len(declared)


def test_declarations_hold_together() -> None:
    for protocol in PROTOCOLS:
        assert set(protocol.changes) <= set(protocol.facts), protocol.name
        assert set(protocol.hosts) <= set(protocol.facts), protocol.name
        assert not protocol.headline or protocol.headline in protocol.facts, protocol.name
        assert all(other in BY_NAME for other in protocol.carries), protocol.name
        for fact in protocol.facts:
            assert OWNERS[fact] is protocol, f"{fact} is declared twice"


def test_parsers_set_only_facts_that_are_declared() -> None:
    for client, server, _ in OPENINGS.values():
        for parser in PARSERS:
            result = parser(client, server)
            if isinstance(result, Found):
                protocol = BY_NAME[result.facts["protocol"]]
                allowed = {*protocol.facts, *(fact for other in protocol.carries for fact in BY_NAME[other].facts)}
                assert set(result.facts) - {"protocol"} <= allowed, protocol.name


def test_every_fact_is_a_rule_key_and_every_protocol_a_condition() -> None:
    assert set(OWNERS) <= set(ATTRIBUTES) <= set(RuleOptions.model_fields)
    # DNS over TLS is a fact of a flow that is TLS.
    assert set(APPLICATIONS) == set(BY_NAME) - {"dot"}
    assert set(OWNERS) >= HOSTS


def test_every_headline_is_shown() -> None:
    for fact in HEADLINES:
        assert words({"protocol": "p", fact: "it"}) == "p it"


def test_every_fact_and_protocol_is_documented() -> None:
    table = DOCS.read_text().partition("## The facts")[2].partition("\n## ")[0]
    named = set(re.findall(r"`\"?([a-z0-9_-]+)\"?`", table))
    assert set(OWNERS) - named == set()
    assert set(BY_NAME) - named == set()
