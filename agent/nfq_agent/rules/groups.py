"""Rules by control group, for the groups that exist now. No I/O.

Both backends bind such a rule to the group that has its path when the rule is inserted: xtables to the group itself
(xt_cgroup.c, cgroup_get_from_path()), nf_tables to its number. A service that starts again has a new group with the same path,
and the rule matches nothing then. So each rule carries the numbers of its groups in a comment, and a new number makes another
rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Final

from nfq_agent.rules.model import GROUPS, OFFLOAD_ACCEPTED, OWNER_NEW, Extension, Option, Rule, Ruleset, TableRules

# Names of rules that stand before one of a [rules.NAME], and match the same.
_OF_THE_AGENT: Final = (OWNER_NEW, OFFLOAD_ACCEPTED)

# By path; None for a group that does not exist.
Numbers = Mapping[str, int | None]


def paths(ruleset: Ruleset) -> dict[str, list[str]]:
    """The paths of all control groups in the rules, each with the names of the rules that take their packets alone."""
    found: dict[str, list[str]] = {}
    for rule in (rule for tables in ruleset.values() for table in tables.values() for rule in table.rules):
        for match in rule.matches:
            if match.name == "cgroup":
                path, name = match.options[0].value, rule.tag.rpartition(":")[2].partition(".")[0]
                names = found.setdefault(path, [])
                if not match.options[0].negated and name not in (*names, *_OF_THE_AGENT):
                    names.append(name)
    return found


def bound(ruleset: Ruleset, numbers: Numbers) -> Ruleset:
    """The rules with the numbers of their control groups.

    Without the rules for packets of groups that do not exist: no packet has such a group. A condition that excludes one holds
    for all packets, and is left out.
    """
    return {
        family: {
            name: TableRules(
                {chain: tuple(_bound(rules, numbers)) for chain, rules in table.chains.items()},
                tuple(_bound(table.jumps, numbers)),
            )
            for name, table in tables.items()
        }
        for family, tables in ruleset.items()
    }


def _bound(rules: tuple[Rule, ...], numbers: Numbers) -> Iterator[Rule]:
    for rule in rules:
        groups = [match.options[0] for match in rule.matches if match.name == "cgroup"]
        if not groups:
            yield rule
        elif all(group.negated or numbers.get(group.value) is not None for group in groups):
            yield _with_numbers(rule, numbers)


def _with_numbers(rule: Rule, numbers: Numbers) -> Rule:
    kept, found = [], []
    for match in rule.matches:
        if match.name == "cgroup":
            if (number := numbers.get(match.options[0].value)) is None:
                continue
            found.append(str(number))
        kept.append(match)
    if not found:
        return replace(rule, matches=tuple(kept))
    comment = Extension("comment", (Option("--comment", GROUPS + "-".join(found)),))
    # The tag is the last comment.
    return replace(rule, matches=(*kept[:-1], comment, kept[-1]))
