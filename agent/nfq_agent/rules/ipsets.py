"""Rules by an ipset, for the address family that the set has. No I/O.

A set holds addresses of one family, or none at all (ports, interfaces, other sets). The kernel finds no packet of the other
family in it, and iptables refuses such a rule. So a rule for packets in the set is made for the set's family alone, and a
condition that excludes the set is left out for the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Final

from nfq_agent.rules.model import OFFLOAD_ACCEPTED, OWNER_NEW, Option, Rule, RuleError, Ruleset, TableRules

# By the name of a set: the family of its addresses; None for a set without.
Families = Mapping[str, str | None]

_ADDRESSES: Final = {"inet": "IPv4", "inet6": "IPv6"}
# Names of rules that stand before one of a [rules.NAME], and match the same.
_OF_THE_AGENT: Final = (OWNER_NEW, OFFLOAD_ACCEPTED)


def names(ruleset: Ruleset) -> dict[str, list[str]]:
    """The ipsets in the rules, each with the names of the rules that have it as a condition."""
    found: dict[str, list[str]] = {}
    for family in ruleset:
        for rule, option in _conditions(ruleset, family):
            named = found.setdefault(set_name(option), [])
            if (name := _name(rule)) not in (*named, *_OF_THE_AGENT):
                named.append(name)
    return found


def fitted(ruleset: Ruleset, families: Families) -> Ruleset:
    """The rules with each condition by a set in the set's own family only. Raises RuleError for a rule that is then in none."""
    for name, family in families.items():
        if family is None:
            continue
        here = {_name(rule) for rule, option in _conditions(ruleset, family) if set_name(option) == name}
        for other in ruleset:
            for rule, option in _conditions(ruleset, other):
                if set_name(option) == name and not option.negated and _name(rule) not in here:
                    raise RuleError(
                        f"rules.{_name(rule)} takes packets by the ipset {name}, which holds {_ADDRESSES[family]} addresses, and "
                        f'has no rule for {_ADDRESSES[family]}; set family = "{family}" there (IPv6 must be on for inet6), or '
                        "name a set of the other family"
                    )
    return {
        family: {
            name: TableRules(
                {chain: tuple(_fitted(rules, family, families)) for chain, rules in table.chains.items()},
                tuple(_fitted(table.jumps, family, families)),
            )
            for name, table in tables.items()
        }
        for family, tables in ruleset.items()
    }


def refuse_fewer_directions(ruleset: Ruleset, name: str, kind: str, dimensions: int) -> None:
    """Raise RuleError for a rule by this set with fewer directions than its type looks up: the kernel would match no packet.

    kind: the set's type, as `hash:ip,port`, which has two dimensions.
    """
    for family in ruleset:
        for rule, option in _conditions(ruleset, family):
            directions = option.value.partition(" ")[2].split(",")
            if set_name(option) == name and len(directions) < dimensions:
                key = "not_set" if option.negated else "set"
                enough = ",".join([*directions, *[directions[-1]] * (dimensions - len(directions))])
                raise RuleError(
                    f"the ipset {name} of rules.{_name(rule)} is of type {kind}: {option.value!r} matches no packet; give it "
                    f'{dimensions} directions, as in {key} = "{name} {enough}"'
                )


def set_name(option: Option) -> str:
    """The name of the set in `--match-set NAME DIRECTIONS`."""
    return option.value.partition(" ")[0]


def _conditions(ruleset: Ruleset, family: str) -> Iterator[tuple[Rule, Option]]:
    for table in dict(ruleset).get(family, {}).values():  # type: ignore[call-overload]  # a family's name
        for rule in table.rules:
            for match in rule.matches:
                if match.name == "set":
                    yield rule, match.options[0]


def _name(rule: Rule) -> str:
    return rule.tag.rpartition(":")[2].partition(".")[0]


def _fitted(rules: tuple[Rule, ...], family: str, families: Families) -> Iterator[Rule]:
    for rule in rules:
        foreign = [
            match
            for match in rule.matches
            if match.name == "set" and families.get(set_name(match.options[0])) not in (None, family)
        ]
        if not foreign:
            yield rule
        elif all(match.options[0].negated for match in foreign):
            yield replace(rule, matches=tuple(match for match in rule.matches if match not in foreign))
