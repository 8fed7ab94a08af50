"""Rules of a policy as entries of a map: which are apart, and their text."""

from __future__ import annotations

from typing import Any

import pytest

from nfq_agent.host.attributes import attributes
from nfq_agent.host.nftables import entries as kernel_entries
from nfq_agent.host.nftables.entries import EntrySet
from nfq_agent.policy_options import PolicyOptions
from nfq_agent.rules.entries import MapEntry, apart, entries_of, parsed, shape, words
from nfq_agent.rules.model import FAMILIES, Family


def made(family: Family, *rules: dict[str, Any]) -> list[list[MapEntry]]:
    options = PolicyOptions.model_validate({"rule": [{"action": "drop", **rule} for rule in rules]})
    found = [entries_of(rule, rule.action, number, family) for number, rule in options.numbered]
    return [each for each in found if each is not None]


def test_a_rule_has_an_entry_for_each_choice() -> None:
    rule = {"dst": ["10.0.0.0/8", "fd00::/8"], "dport": [80, "8080:8090"], "protocol": ["tcp", "udp"]}
    (first,), (second,) = made("inet", rule), made("inet6", rule)
    fields = ("dst", "protocol", "dport")
    assert words(tuple(first), fields, "inet") == (
        "10.0.0.0-10.255.255.255/6/80=drop.1,10.0.0.0-10.255.255.255/6/8080-8090=drop.1,"
        "10.0.0.0-10.255.255.255/17/80=drop.1,10.0.0.0-10.255.255.255/17/8080-8090=drop.1"
    )
    assert parsed(words(tuple(first), fields, "inet")) == tuple(first)
    text = words(tuple(second), fields, "inet6")
    assert text.startswith("fd00::-fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/6/80=drop.1,")
    assert parsed(text) == tuple(second)


def test_ports_are_those_of_protocols_that_have_some_and_no_protocol_is_any() -> None:
    ((*ports,), (network,), (none,)) = made(
        "inet", {"dport": [53]}, {"src": ["192.0.2.0/24"]}, {"protocol": ["icmp"], "src": ["192.0.2.1"]}
    )
    assert [entry.spans[0] for entry in ports] == [(number, number) for number in (6, 17, 33, 132, 136)]
    assert network.spans[1] == (0, 255)
    assert none.spans == ((0xC0000201, 0xC0000201), (1, 1))


@pytest.mark.parametrize(
    "rule", [{"uid": [0]}, {"interface": ["lo"]}, {"hook": ["input"]}, {"direction": "in"}, {"gid": [0]}], ids=str
)
def test_other_conditions_have_no_field(rule: dict[str, Any]) -> None:
    (found,) = PolicyOptions.model_validate({"rule": [{"action": "drop", "dport": [1], **rule}]}).rules
    assert shape(found) == ()


def test_a_rule_of_too_many_choices_is_none_of_a_map() -> None:
    ports = [number * 2 for number in range(1, 200)]
    assert made("inet", {"dport": ports, "sport": [1, 3]}) == []


def test_a_list_is_cut_where_two_rules_meet_the_same_packet() -> None:
    rules = made(
        "inet",
        {"dst": ["10.0.0.0/16"], "dport": [1]}, {"dst": ["10.0.0.0/16"], "dport": [2]}, {"dst": ["10.1.0.0/16"], "dport": [1]},
        {"dst": ["10.0.0.0/8"], "dport": [2]}, {"dst": ["10.2.0.0/16"], "dport": ["1:9"]}, {"dst": ["10.0.0.0/8"], "dport": [9]},
    )  # fmt: skip
    assert list(apart(rules)) == [(0, 3), (3, 4), (4, 5), (5, 6)]
    assert list(apart([])) == []
    # Too many side by side to be compared.
    assert len(list(apart([[MapEntry(((0, 9), (number, number)), "drop", 1)] for number in range(400)]))) == 1
    wide = [[MapEntry(((number, 10_000 + number), (number, 10_000 + number)), "drop", 1)] for number in range(400)]
    assert list(apart(wide)) == [(number, number + 1) for number in range(400)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_map", [True, False])
def test_a_set_is_read_as_it_was_written(family: Family, is_map: bool) -> None:
    fields = ("src", "dst", "protocol", "sport", "dport")
    rule = {
        "src": ["10.0.0.0/8", "fd00::/8"],
        "dst": ["192.0.2.1", "::1"],
        "sport": [5],
        "dport": ["1:65535"],
        "protocol": ["tcp"],
    }
    (entries,) = made(family, rule)
    wanted = tuple(entries) if is_map else tuple(each._replace(action="", number=0) for each in entries)
    kinds = kernel_entries.kinds_of(fields, family)
    named = EntrySet("map.x", kinds, wanted, is_map)
    lists = [packed[4:] for packed in named.element_lists(wanted)]
    found, packets = kernel_entries.read("map.x", kinds, is_map, lists)
    assert found == named
    assert packets == ({1: 0} if is_map else {})
    assert kernel_entries.kinds_of_type(int.from_bytes(dict(_attributes(named.declaration(1)))[4], "big")) == kinds


def _attributes(data: bytes) -> list[tuple[int, bytes]]:
    return [(kind & 0x3FFF, value) for kind, value in attributes(data)]
